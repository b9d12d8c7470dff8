import open_clip
import pytest


@pytest.fixture
def model():
    vision = dict(layers=1, width=32, head_width=16, patch_size=16, image_size=32)
    return open_clip.CLIP(16, vision, dict(layers=1, width=32, heads=2))
