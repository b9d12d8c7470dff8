"""A made checkpoint of which the figures are known: a patch is a one-hot class, and so is the class's name."""

import json

import numpy as np
import open_clip
import pytest
import torch
from launching import write_model
from PIL import Image
from suite_trees import write

from sparc_loss import cli
from sparc_loss.evaluation.suites import SUITES

CLASSES = 20
PATCH, SIZE = 5, 30  # a patch has more pixels than there are classes
CONFIG = {
    "embed_dim": CLASSES,
    "vision_cfg": {"image_size": SIZE, "layers": 1, "width": CLASSES, "head_width": CLASSES, "patch_size": PATCH},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": CLASSES, "heads": 1, "layers": 1},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of open_clip with weights made by hand, in a folder."""
    folder = tmp_path_factory.mktemp("known") / "model"
    write_model(folder, CONFIG)
    settings = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
    settings["preprocess_cfg"] = {"mean": [0, 0, 0], "std": [1, 1, 1]}
    (folder / "open_clip_config.json").write_text(json.dumps(settings), encoding="utf-8")
    model = open_clip.create_model(f"local-dir:{folder}")
    state_dict = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    identity = torch.eye(CLASSES)
    for name, value in state_dict.items():
        if "ln_" in name and name.endswith("weight"):
            value.fill_(1)
    # A patch of class i has its pixel i lit; the block adds nothing to it.
    state_dict["visual.conv1.weight"] = identity.new_zeros(CLASSES, 3, PATCH * PATCH)
    for label in range(CLASSES):
        state_dict["visual.conv1.weight"][label, :, label] = 1
    state_dict["visual.conv1.weight"] = state_dict["visual.conv1.weight"].view(CLASSES, 3, PATCH, PATCH)
    state_dict["visual.proj"] = state_dict["text_projection"] = identity
    # A word of a class's name is one-hot, other words are nothing; the end of text attends to all words alike.
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    names = [of_class[0] for of_class in SUITES["voc20"].protocols["plain"].classes]
    words = [set(tokenizer.encode(name)) for name in names]
    for label, own in enumerate(words):
        others = set().union(*words[:label], *words[label + 1 :])
        assert own - others
        state_dict["token_embedding.weight"][list(own - others), label] = 1
    block = "transformer.resblocks.0.attn"
    state_dict[f"{block}.in_proj_weight"][2 * CLASSES :] = identity
    state_dict[f"{block}.out_proj.weight"] = identity
    torch.save(state_dict, folder / "open_clip_pytorch_model.bin")
    return folder


def voc(root, shift):
    """One image with a band for each class, whose mask is moved to the right by some pixels."""
    base = root / "VOCdevkit" / "VOC2012"
    labels = np.arange(CLASSES)
    patches = np.zeros((CLASSES, PATCH * PATCH), np.uint8)
    patches[labels, labels] = 255
    # Each class has two columns of patches, 10 pixels; a column has 6 rows.
    columns = patches.reshape(CLASSES, PATCH, PATCH).repeat(2, axis=0)
    pixels = np.tile(np.concatenate(list(columns), axis=1), (SIZE // PATCH, 1))
    bands = np.tile(np.roll(labels.repeat(2 * PATCH) + 1, shift), (SIZE, 1)).astype(np.uint8)
    for folder, name, drawn in (
        ("JPEGImages", "a.jpg", np.stack([pixels] * 3, axis=-1)),
        ("SegmentationClass", "a.png", bands),
    ):
        (base / folder).mkdir(parents=True)
        Image.fromarray(drawn).save(base / folder / name, format="PNG")  # without the losses of JPEG
    write(base / "ImageSets" / "Segmentation" / "val.txt", "a\n")


@pytest.mark.parametrize("window", [0, SIZE])
@pytest.mark.parametrize(("shift", "expected"), [(0, 1.0), (3, 7 / 13), (5, 5 / 15)])
def test_its_mean_iou_is_the_value_computed_by_hand(model, tmp_path, capsys, shift, expected, window):
    # Of the 10 pixels of each band, 10 - shift lie where the mask has the class, of 10 + shift in either.
    voc(tmp_path / "data", shift)
    arguments = {
        "suite": "voc20",
        "data-root": tmp_path / "data",
        "model": f"local-dir:{model}",
        "short-side": SIZE,
        "window": window,
        "stride": 2 * PATCH,
        "workers": 0,
        "device": "cpu",
        "output": tmp_path / "figures.json",
    }
    argv = [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    assert cli.main(["evaluate", *argv]) == 0
    record = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))["suites"]["voc20"]
    assert record["figures"]["mean_iou"]["value"] == pytest.approx(expected)
    assert list(record["iou_of_classes"].values()) == pytest.approx([expected] * CLASSES)
    assert f"{100 * expected:.1f}" in capsys.readouterr().out.split()
