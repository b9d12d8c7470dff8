"""Files that a command writes: whole or not at all."""

import os
import re

import pytest

from sparc_loss._files import check_output, whole_file


def test_a_file_takes_the_place_of_an_earlier_one(tmp_path):
    path = tmp_path / "figures.json"
    path.write_text("earlier", encoding="utf-8")
    with whole_file(path) as draft:
        draft.write_text("new", encoding="utf-8")
        assert path.read_text(encoding="utf-8") == "earlier"
        assert draft.suffix == ".json"
    assert (list(tmp_path.iterdir()), path.read_text(encoding="utf-8")) == ([path], "new")


def test_what_fails_half_way_leaves_the_earlier_file_and_nothing_else(tmp_path):
    path = tmp_path / "words.png"
    path.write_text("earlier", encoding="utf-8")

    def write_half(draft):
        draft.write_text("ha", encoding="utf-8")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"), whole_file(path) as draft:
        write_half(draft)
    assert (list(tmp_path.iterdir()), path.read_text(encoding="utf-8")) == ([path], "earlier")


def test_a_link_stays_and_the_file_that_it_leads_to_is_written(tmp_path):
    path, link = tmp_path / "figures.json", tmp_path / "link.json"
    link.symlink_to(path)
    with whole_file(link) as draft:
        draft.write_text("new", encoding="utf-8")
    assert link.is_symlink()
    assert path.read_text(encoding="utf-8") == "new"


def test_where_no_file_can_be_written_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, problem in (
        (tmp_path, "is a folder"),
        (tmp_path / "pipe", "is a device or a pipe"),
        (tmp_path / "none" / "figures.json", "is in no folder that can be written to"),
    ):
        with pytest.raises(
            ValueError, match=f"^argument --output: '{re.escape(str(path))}' {problem}; expected a file$"
        ):
            check_output(path)
    check_output(tmp_path / "figures.json")


def test_an_input_is_not_written_over(tmp_path):
    data, link = tmp_path / "data.csv", tmp_path / "link.csv"
    data.touch()
    link.symlink_to(data)
    check_output(tmp_path / "figures.json", data, None, "a tag of open_clip")
    with pytest.raises(ValueError, match=r"link\.csv' is also an input, which would be lost; expected a file"):
        check_output(link, None, data)


def test_a_name_as_long_as_a_disk_allows_can_be_written(tmp_path):
    path = tmp_path / ("x" * 250 + ".json")
    with whole_file(path) as draft:
        draft.write_text("new", encoding="utf-8")
    assert path.read_text(encoding="utf-8") == "new"
