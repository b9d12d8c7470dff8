"""Tables in Markdown."""

import pytest

from sparc_loss.evaluation.markdown import markdown_table


def test_the_first_column_stands_left_and_the_others_right():
    assert markdown_table([["measure", "a", "chance"], ["mIoU", "0.25", "-"]]) == (
        "| measure |    a | chance |\n| ------- | ---: | -----: |\n| mIoU    | 0.25 |      - |\n"
    )


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="shorter"):
        markdown_table([["measure", "model"], ["mIoU"]])
