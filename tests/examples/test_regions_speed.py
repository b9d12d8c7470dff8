"""What boxes cost the loader is measured and printed; times decide nothing."""

import pytest

from examples.regions_speed import regions_speed, show_regions_speed

pytestmark = pytest.mark.slow


def test_loaders_with_boxes_in_all_rows_and_in_few(capsys):
    results = regions_speed(pairs=40, rounds=2)
    assert [(each["images"], each["boxes"]) for each in results] == [
        (images, boxes)
        for images in ("scenes of 64 x 64", "photographs of 500 x 375")
        for boxes in ("all rows", "1 % of the rows")
    ]
    assert all(each["milliseconds"] > 0 and each["times"] == sorted(each["times"]) for each in results)
    show_regions_speed(results)
    assert capsys.readouterr().out.count("times as long (") == 4
