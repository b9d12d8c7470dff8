"""The published figures: each has a source, and those of OpenAI's ViT-B/16 are what was read."""

from collections import Counter

import pytest

from sparc_loss.evaluation.suites import SUITES
from sparc_loss.evaluation.suites.published import published_figures, references
from sparc_loss.evaluation.titles import suite_title

SEGMENTATION = ("voc21", "context60", "coco-object", "voc20", "context59", "coco-stuff", "cityscapes", "ade20k")
# OpenAI's ViT-B/16, in per cent, None where a source has none.
READ = [
    ("plain", "Trident", (16.4, 8.4, 5.6, 41.9, 9.2, 4.4, 5.0, 2.9)),
    ("plain", "ClearCLIP", (None, None, None, 41.8, 9.2, 4.4, 5.5, 2.1)),
    ("maskclip", "Trident", (43.4, 23.2, 20.6, 74.9, 26.4, 16.7, 24.9, 11.9)),
    ("maskclip", "ClearCLIP", (None, None, None, 74.9, 26.4, 16.4, 12.6, 9.8)),
    ("sclip", "SCLIP", (59.63, 31.74, 33.52, 81.54, 34.46, 22.77, 32.34, 16.45)),
    ("clearclip", "ClearCLIP", (None, None, None, 80.9, 35.9, 23.9, 30.0, 16.7)),
]
OTHERS = {
    ("flickr30k", "image_to_text_R@1"): 82.2,
    ("flickr30k", "image_to_text_R@10"): 99.0,
    ("flickr30k", "text_to_image_R@1"): 62.2,
    ("flickr30k", "text_to_image_R@5"): 85.7,
    ("coco", "image_to_text_R@1"): 52.4,
    ("coco", "text_to_image_R@1"): 33.1,
    ("coco", "text_to_image_R@10"): 69.0,
    ("imagenet", "zero_shot_top1"): 68.3,
    ("sugarcrepe", "replace_obj/hard_negative_accuracy"): 93.5,
    ("sugarcrepe", "replace_att/hard_negative_accuracy"): 81.0,
    ("sugarcrepe", "replace_rel/hard_negative_accuracy"): 66.6,
    ("sugarcrepe", "swap_obj/hard_negative_accuracy"): 60.0,
    ("sugarcrepe", "swap_att/hard_negative_accuracy"): 65.0,
    ("sugarcrepe", "add_obj/hard_negative_accuracy"): 78.4,
    ("sugarcrepe", "add_att/hard_negative_accuracy"): 66.8,
    ("aro", "relation/hard_negative_accuracy_of_groups"): 59.4,
    ("aro", "attribution/hard_negative_accuracy_of_groups"): 62.6,
}


def test_each_figure_has_a_suite_a_protocol_a_name_and_a_source():
    for each in published_figures():
        assert each.protocol in (SUITES[each.suite].protocols or ("",))
        assert suite_title(each.figure)
        assert 0 < each.value < 100
        assert each.source
        assert each.model


def test_no_source_gives_a_figure_twice():
    assert max(Counter(each._replace(value=0) for each in published_figures()).values()) == 1


@pytest.mark.parametrize(("protocol", "source", "values"), READ)
def test_tables_of_segmentation(protocol, source, values):
    for suite, value in zip(SEGMENTATION, values, strict=True):
        shown = references(suite, "mean_iou", protocol, "ViT-B-16", "openai")
        found = [each.value for each in shown if each.source.startswith(f"{source},")]
        assert found == ([] if value is None else [value])


@pytest.mark.parametrize(("suite", "figure"), list(OTHERS))
def test_tables_of_pooled_features(suite, figure):
    (found,) = references(suite, figure, "", "ViT-B-16", "openai")
    assert found.value == OTHERS[suite, figure]


def test_a_models_own_figures_come_first_then_those_of_openais_vit_b_16():
    def shown(model, pretrained):
        return {(each.model, each.pretrained) for each in references("voc20", "mean_iou", "plain", model, pretrained)}

    assert shown("ViT-L-14", "openai") == {("ViT-L-14", "openai")}
    # QuickGELU's weights are also named without it.
    assert shown("ViT-B-16", "metaclip_fullcc") == {("ViT-B-16-quickgelu", "metaclip_fullcc")}
    assert shown("ViT-B-32", "some/epoch_5.pt") == {("ViT-B-16", "openai")}
    assert references("flickr30k-entities", "word_pointing", "", "ViT-B-16", "openai") == []


# Of the authors' files: short side, window, stride, reading, scale, threshold, minimal area, names of background.
CLEAR = {
    "voc20": (448, 448, 224, "clear", 50, 0, 0, 0),
    "voc21": (448, 448, 224, "clear", 50, 0.5, 0, 1),
    "context60": (448, 448, 224, "clear", 50, 0.15, 0, 1),
    "coco-object": (448, 448, 224, "clear", 50, 0.4, 0, 1),
    "cityscapes": (448, 224, 224, "clear", 50, 0, 0, 0),
    "ade20k": (448, 448, 224, "clear", 50, 0, 0, 0),
}
SCLIP = {
    "voc20": (336, 224, 112, "self", 40, 0, 0, 0),
    "voc21": (336, 224, 112, "self", 65, 0.1, 0.1, 26),
    "context59": (336, 224, 112, "self", 40, 0, 0, 0),
    "context60": (336, 224, 112, "self", 50, 0.1, 0, 1),
    "coco-object": (336, 224, 112, "self", 50, 0.1, 0, 26),
    "coco-stuff": (448, 224, 112, "self", 40, 0, 0, 0),
    "cityscapes": (560, 224, 112, "self", 40, 0, 0, 0),
}
PRESETS = [("clearclip", *row) for row in CLEAR.items()] + [("sclip", *row) for row in SCLIP.items()]


@pytest.mark.parametrize(("preset", "suite", "expected"), PRESETS)
def test_presets_are_the_authors_settings(preset, suite, expected):
    protocol = SUITES[suite].protocols[preset]
    found = (protocol.short_side, protocol.window, protocol.stride, protocol.reading, protocol.logit_scale)
    found += (protocol.background_threshold, protocol.minimal_area, len(protocol.background))
    assert found == expected


def test_plain_and_maskclip_differ_from_clearclip_in_the_reading_and_the_threshold():
    for suite in SUITES.values():
        for preset, reading in (("plain", "last"), ("maskclip", "value")) if suite.protocols else ():
            protocol, clear = suite.protocols[preset], suite.protocols["clearclip"]
            assert protocol.reading == reading
            assert protocol.background_threshold == (0.2 if clear.background else 0)
            assert (protocol.short_side, protocol.window, protocol.stride) == (448, clear.window, 224)
            assert protocol.classes == clear.classes


def test_sclips_synonyms():
    names = dict(
        zip(SUITES["voc20"].protocols["plain"].classes, SUITES["voc20"].protocols["sclip"].classes, strict=True)
    )
    assert len(names["person",]) == 7
    assert "television" in names["tvmonitor",]
