"""What evaluation costs beside the model's forward is measured and printed; times decide nothing."""

import pytest

from examples.segmentation_speed import segmentation_speed, show_segmentation_speed

pytestmark = pytest.mark.slow


def test_forward_and_rest_of_made_images(capsys):
    result = segmentation_speed(2, "ViT-S-32-alt")
    assert (result["model"], result["images"]) == ("ViT-S-32-alt", 2)
    assert result["forward_seconds"] > 0
    assert result["rest_seconds"] > 0
    low, middle, high = result["rest_over_forward"]
    assert low <= middle <= high
    show_segmentation_speed(result)
    printed = capsys.readouterr().out
    assert "voc20, plain protocol, 2 made images of 500 x 375, ViT-S-32-alt: forward " in printed
    assert f"{middle:.1%} of the forward" in printed
