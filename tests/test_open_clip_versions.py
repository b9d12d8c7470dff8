from importlib.metadata import requires, version

import open_clip
import pytest
from major_version import MAJOR_VERSION
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sparc_loss.hooks.hooked import module_of_major_version
from sparc_loss.open_clip_versions import (
    TESTED,
    TESTED_UNRELEASED,
    UntestedVersionError,
    check_version,
    logs_diagnostics,
)


def test_the_installed_open_clip_is_one_we_claim():
    assert version("open_clip_torch") in TESTED


def test_the_train_extra_admits_just_the_same_range():
    requirements = map(Requirement, requires("sparc-loss"))
    train = next(
        requirement for requirement in requirements if canonicalize_name(requirement.name) == "open-clip-torch"
    )
    assert all(tested in train.specifier for tested in TESTED)
    assert not {"2.32.0", "3.4.0", "4.0.0"} & set(train.specifier.filter(["2.32.0", "3.4.0", "4.0.0"]))


@pytest.mark.parametrize("found", ["2.32.0", "3.4.0", "4.0.0", "4.2.0", "4.2.0.dev1", "3.3.1.dev0", "3.33.0"])
def test_another_version_is_one_readable_error_with_what_was_found_and_tested(found):
    with pytest.raises(UntestedVersionError) as raised:
        check_version(found)
    assert f"open_clip_torch {found} is installed" in str(raised.value)
    assert f"tested with {', '.join(TESTED)}, and 4.2.0.dev0 of its main branch" in str(raised.value)
    assert f"pip install 'open_clip_torch=={TESTED[-1]}'" in str(raised.value)


@pytest.mark.parametrize("version", TESTED + TESTED_UNRELEASED)
def test_every_tested_version_is_accepted(version):
    assert check_version(version) is None


@pytest.mark.parametrize(("found", "tested"), [("3.3.1", "3.3.0"), ("3.0.12", "3.0.0")])
def test_a_patch_release_of_a_tested_minor_version_is_accepted_with_a_warning(found, tested):
    assert check_version(found) == f"open_clip_torch {found} is installed; sparc_loss.train was tested with {tested}"


def test_diagnostics_are_logged_from_open_clip_4_on():
    assert [logs_diagnostics(version) for version in ("3.0.0", "3.3.0", "4.2.0.dev0", "5.0.0")] == [
        False,
        False,
        True,
        True,
    ]


def test_the_module_of_a_major_version_is_named_for_it():
    assert module_of_major_version(open_clip.__version__).__name__.endswith(f"open_clip_{MAJOR_VERSION}")
