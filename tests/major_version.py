"""What of the tests belongs to one major version of open_clip alone."""

import open_clip
import pytest

from sparc_loss.open_clip_versions import major_version

MAJOR_VERSION = major_version(open_clip.__version__)
only_open_clip_3 = pytest.mark.skipif(MAJOR_VERSION != 3, reason="of open_clip 3")
only_open_clip_4 = pytest.mark.skipif(
    MAJOR_VERSION != 4, reason="of open_clip 4: make test-main OPEN_CLIP=a checkout of its main branch"
)
