"""The figure: what its panels hold."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import tiny_models
import torch
from aligned_pairs import WEIGHTS, pair
from matplotlib.figure import Figure
from open_clip.transform import image_transform
from PIL import Image
from tiny_tokenizers import word_level

from sparc_loss.show import align, alignment_figure, draw
from sparc_loss.show.figure import light


def panels(figure: Figure) -> dict[str, np.ndarray]:
    """The pixels of each panel, by its label."""
    return {axes.get_label(): np.asarray(axes.images[0].get_array()) for axes in figure.axes}


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.texts]


def brightness_by_hand(weights: list[list[float]], height: int, width: int, patch: tuple[int, int]) -> np.ndarray:
    highest = max(map(max, weights))
    lit = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            row, column = y // patch[0], x // patch[1]
            if row < len(weights) and column < len(weights[0]):
                lit[y, x] = (weights[row][column] / highest) ** 2
    return lit


def test_each_pixel_is_lit_by_the_weight_of_its_patch():
    for lit, weights in zip(light(pair()).numpy(), WEIGHTS, strict=True):
        np.testing.assert_allclose(lit, brightness_by_hand(weights, 16, 30, (8, 10)), rtol=1e-6)


@pytest.mark.parametrize("smooth", [False, True])
def test_pixels_outside_of_all_patches_stay_dark(smooth):
    wide = replace(pair(), pixels=np.full((19, 34, 3), 255, np.uint8))
    lit = light(wide, smooth)
    assert torch.equal(lit[:, :16, :30], light(pair(), smooth))
    assert not lit[:, 16:].any()
    assert not lit[:, :, 30:].any()


def test_smooth_light_equals_the_patches_at_their_centres():
    odd = replace(pair(), pixels=np.full((18, 33, 3), 255, np.uint8), patch_size=(9, 11))
    torch.testing.assert_close(light(odd, smooth=True)[:, 4::9, 5::11], light(odd)[:, 4::9, 5::11])


def test_smooth_light_is_half_way_between_two_patches():
    lit = light(pair(), smooth=True)[1]  # between 0.0625 below and 1 at the right column: rows blend at y = 8
    between = (lit[7, 25] + lit[8, 25]) / 2
    torch.testing.assert_close(between, torch.tensor((0.0625 + 1) / 2))


def test_a_panel_is_the_image_lit_for_its_word():
    drawn = panels(draw([pair()]))
    assert list(drawn) == ["image", "red", "dog", "!"]
    assert (drawn["image"] == 1).all()
    night = np.array([0.055, 0.065, 0.09])
    for label, weights in zip(("red", "dog", "!"), WEIGHTS, strict=True):
        brightness = 0.1 + 0.9 * brightness_by_hand(weights, 16, 30, (8, 10))[..., None]
        np.testing.assert_allclose(drawn[label], brightness + (1 - brightness) * night, rtol=1e-5)


def test_a_panel_tells_the_share_of_patches_kept():
    labels = texts(draw([pair()]))
    assert [labels[labels.index(word) + 1] for word in ("red", "dog", "!")] == ["50%", "33%", "67%"]


def test_all_but_one_patch_of_many_are_not_all():
    weights = torch.ones(1, 20, 20) / 399
    weights[0, 3, 4] = 0
    many = replace(pair(words=("red",)), weights=weights, patch_size=(0.8, 1.5))
    assert ">99%" in texts(draw([many]))


def test_a_very_long_word_is_cut_in_its_label():
    long = "antidisestablishmentarianism"
    figure = draw([pair(long, (long,))])
    assert "antidisestab…" in texts(figure)
    assert long in panels(figure)


def test_the_highest_patch_is_framed_where_there_is_one():
    frames = {axes.get_label(): [frame.get_bbox().bounds for frame in axes.patches] for axes in draw([pair()]).axes}
    # Left, top, width and height; the first pixel's left edge is at -0.5.
    assert frames == {"image": [], "red": [(-0.5, -0.5, 10, 8)], "dog": [(19.5, 7.5, 10, 8)], "!": []}


def test_boxes_are_outlined_on_the_image_and_on_the_words_that_name_them():
    boxed = replace(pair(), boxes=(((2.0, 3.0, 12.0, 9.0), (1,)),))
    figure = draw([boxed])
    outlines = [
        [each.get_bbox().extents.tolist() for each in axes.patches if each.get_linestyle() == "--"]
        for axes in figure.axes
    ]
    assert outlines == [[[1.5, 2.5, 11.5, 8.5]], [], [[1.5, 2.5, 11.5, 8.5]], *[[]] * (len(figure.axes) - 3)]
    assert "Dashed: annotated boxes." in texts(figure)[-1]
    assert "Dashed" not in texts(draw([pair()]))[-1]


def test_the_whole_way_from_image_and_caption(tmp_path):
    model = tiny_models.clip()
    tokenizer = word_level(tmp_path, None, pad="[PAD]")
    preprocess = image_transform((16, 24), is_train=False)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))
    options = {"threshold": 0.3, "alignment": "sparse"}
    figure = alignment_figure(image, "a red dog!", model, preprocess, tokenizer, smooth=True, **options)
    expected = draw([align(image, "a red dog!", model, preprocess, tokenizer, **options)], smooth=True)
    for label, pixels in panels(expected).items():
        np.testing.assert_array_equal(panels(figure)[label], pixels)


def test_only_the_words_asked_for_are_drawn():
    assert list(panels(draw([pair()], words=["dog"]))) == ["image", "dog"]


def test_no_pairs_are_refused():
    with pytest.raises(ValueError, match="pairs is empty; expected at least one aligned pair"):
        draw([])


def test_a_caption_is_not_repeated_below_itself():
    figure = draw([pair(title="CLIP"), pair(title="SPARC"), pair("dog red!", ("dog", "red", "!"))])
    assert texts(figure).count("red dog!") == 1
    assert texts(figure).count("dog red!") == 1
    assert {"CLIP", "SPARC"} <= set(texts(figure))


def test_a_caption_longer_than_the_context_says_so():
    assert "The model's context ends after 2 of 3 words." in texts(draw([pair(read=2)]))
    assert not any("context" in text for text in texts(draw([pair()])))


def test_what_looks_like_a_formula_stays_text(tmp_path):
    figure = draw([pair("$x^$ <b>", ("$x^$", "<b>"))])
    figure.savefig(tmp_path / "figure.png")
    assert "$x^$" in texts(figure)


def test_letters_without_a_font_are_told_once(caplog, monkeypatch):
    from matplotlib import font_manager

    own = [font for font in font_manager.fontManager.ttflist if "matplotlib" in font.fname]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    draw([pair("dog 狗", ("dog", "狗"))])
    assert "no installed font has the letters '狗'" in caplog.text
    assert len(caplog.records) == 1


def test_a_long_caption_keeps_within_the_figure():
    words = tuple(f"word{index}" for index in range(60))
    figure = draw([pair(" ".join(words), words)])
    figure.draw_without_rendering()
    width = figure.bbox.width
    assert all(text.get_window_extent().x1 < width for text in figure.texts)


def test_pyplot_is_left_alone():
    before = plt.get_fignums()
    draw([pair()])
    assert plt.get_fignums() == before
