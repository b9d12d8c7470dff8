"""One loader of models: whatever open_clip trains opens as it was trained, told by its checkpoint alone."""

import json
import pickle
import re
import shutil
from argparse import ArgumentParser, Namespace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from launching import MODEL_CONFIG, checkpoint_path, train
from PIL import Image

from sparc_loss import cli
from sparc_loss.model_loading import add_model_flags, complete_from_run, load_model, why_not_loaded

pytestmark = pytest.mark.slow

# Each changes what the model gives, of images that are not square.
SETTINGS = {
    "siglip": ("--siglip",),
    "force_quick_gelu": ("--force-quick-gelu",),
    "force_custom_text": ("--force-custom-text",),
    "force_image_size": ("--force-image-size", "24"),
    "force_context_length": ("--force-context-length", "12"),
    "image_mean": ("--image-mean", "0.2", "0.3", "0.4"),
    "image_std": ("--image-std", "0.5", "0.4", "0.3"),
    "image_interpolation": ("--image-interpolation", "bilinear"),
    "image_resize_mode": ("--image-resize-mode", "squash"),
}
EVERY_SETTING = tuple(part for flags in SETTINGS.values() for part in flags)
CAPTION = ["a very long red scene, number one of them all!"]


@pytest.fixture(scope="module")
def folder(folder: Path) -> Path:
    """Tiny data with validation images that are not square, and a run that was trained with every setting."""
    generator = np.random.default_rng(1)
    for index in range(8):
        pixels = generator.integers(0, 255, (48, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((200, 120)).save(folder / f"val{index}.png")
    flags = ("--val-data", str(folder / "val.csv"), "--precision", "fp32", "--sparc-threshold", "0.5")
    train(folder, *EVERY_SETTING, *flags, "--sparc-alignment", "dense", "--sparc-tokens", "all", name="run")
    return folder


def parsed(*argv: str) -> Namespace:
    parser = ArgumentParser()
    add_model_flags(parser)
    for name in ("sparc_threshold", "sparc_alignment", "sparc_fine_grained_scale", "sparc_tokens"):
        parser.set_defaults(**{name: None})
    args = parser.parse_args([str(part) for part in argv])
    args.precision, args.device = "fp32", "cpu"
    return args


def completed(*argv: str) -> Namespace:
    args = parsed(*argv)
    complete_from_run("prog", args, ("sparc_threshold", "sparc_alignment", "sparc_fine_grained_scale", "sparc_tokens"))
    return args


def features(loaded, image: Path) -> tuple[torch.Tensor, ...]:
    model, preprocess, tokenizer = loaded
    with torch.no_grad():
        pixels = preprocess(Image.open(image))[None]
        return pixels, model.eval().encode_image(pixels), model.encode_text(tokenizer(CAPTION))


def same(one, other) -> bool:
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(one, other, strict=True))


def as_open_clip_makes_it(folder: Path, weights: Path, **options):
    """The model, preprocessing and tokenizer that open_clip_train makes of its flags, with a checkpoint's weights."""
    name = f"local-dir:{folder / 'model'}"
    if options.pop("siglip", False):
        options |= {"init_logit_scale": np.log(10), "init_logit_bias": -10}
    model, _, preprocess = open_clip.create_model_and_transforms(name, **options)
    open_clip.load_checkpoint(model, str(weights))
    return model, preprocess, open_clip.get_tokenizer(name, context_length=options.get("force_context_length"))


def test_a_checkpoint_alone_opens_as_it_was_trained(folder):
    path = checkpoint_path(folder, "run")
    args = completed("--pretrained", path)
    expected = as_open_clip_makes_it(
        folder,
        path,
        siglip=True,
        force_quick_gelu=True,
        force_custom_text=True,
        force_image_size=24,
        force_context_length=12,
        image_mean=(0.2, 0.3, 0.4),
        image_std=(0.5, 0.4, 0.3),
        image_interpolation="bilinear",
        image_resize_mode="squash",
    )
    loaded = load_model(args)
    assert loaded[0].logit_bias == torch.load(path, weights_only=True)["state_dict"]["logit_bias"]
    assert same(features(loaded, folder / "val0.png"), features(expected, folder / "val0.png"))
    assert (args.sparc_threshold, args.sparc_alignment, args.sparc_tokens) == (0.5, "dense", "all")


def test_evaluate_gets_the_trainings_own_figures_and_show_draws(folder, capsys, tmp_path):
    path = checkpoint_path(folder, "run")
    output = tmp_path / "out.json"
    flags = ["--pretrained", str(path), "--data", str(folder / "val.csv"), "--workers", "0", "--output", str(output)]
    assert cli.main(["evaluate", *flags]) == 0
    record = json.loads(output.read_text(encoding="utf-8"))
    (line,) = (path.parent / "results.jsonl").read_text(encoding="utf-8").splitlines()
    trained = json.loads(line)
    for name in ("image_to_text_R@1", "image_to_text_R@5", "text_to_image_R@1", "text_to_image_R@5"):
        assert record["measures"][name]["value"] == pytest.approx(trained[name])
    assert (record["siglip"], record["force_image_size"], record["sparc_threshold"]) == (True, 24, 0.5)
    words = tmp_path / "words.html"
    assert (
        cli.main(["show", str(folder / "val0.png"), "a red scene", "--pretrained", str(path), "-o", str(words)]) == 0
    )
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_of_the_run_matters_and_every_flag_is_heeded(folder, tmp_path, name):
    """Without the run's folder the flags must say it all; without one of them the model is another."""
    moved = tmp_path / "moved.pt"
    shutil.copy(checkpoint_path(folder, "run"), moved)
    model = ("--model", f"local-dir:{folder / 'model'}", "--pretrained", moved)
    expected = features(load_model(completed("--pretrained", checkpoint_path(folder, "run"))), folder / "val0.png")
    assert same(features(load_model(completed(*model, *EVERY_SETTING)), folder / "val0.png"), expected)
    others = [part for other, flags in SETTINGS.items() if other != name for part in flags]
    if name in ("siglip", "force_custom_text"):  # told by the weights themselves, or the same weights by other names
        assert same(features(load_model(completed(*model, *others)), folder / "val0.png")[:2], expected[:2])
    else:
        assert not same(features(load_model(completed(*model, *others)), folder / "val0.png"), expected)


def test_the_command_wins_over_the_run_and_says_so(folder, capsys):
    args = completed(
        "--pretrained", checkpoint_path(folder, "run"), "--force-image-size", "32", "--no-force-quick-gelu"
    )
    assert (args.force_image_size, args.force_quick_gelu) == ([32], False)
    warnings = capsys.readouterr().err.splitlines()
    params = folder / "logs" / "run" / "params.txt"
    assert warnings == [
        f"prog: warning: --force-quick-gelu is False, {params} has True; the command's is taken",
        f"prog: warning: --force-image-size is [32], {params} has 24; the command's is taken",
    ]


def test_what_the_command_repeats_is_no_difference(folder, capsys):
    completed("--pretrained", checkpoint_path(folder, "run"), *EVERY_SETTING)
    assert capsys.readouterr().err == ""


def test_a_broken_params_file_is_a_warning(folder, tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(checkpoint_path(folder, "run"), tmp_path / "checkpoints" / "epoch_1.pt")
    text = "no colon\nforce_image_size: many\nimage_mean: (0.1,\nsiglip: True\nunknown: <object>\n"
    (tmp_path / "params.txt").write_text(text, encoding="utf-8")
    args = completed("--pretrained", tmp_path / "checkpoints" / "epoch_1.pt", "--model", "ViT-B/32")
    assert (args.siglip, args.force_image_size, args.image_mean, args.model) == (True, None, None, "ViT-B-32")
    assert "has force_image_size: 'many', which is left out" in capsys.readouterr().err


def test_without_a_run_the_model_has_to_be_named(tmp_path):
    with pytest.raises(ValueError, match="argument --model: not given, and --pretrained is no checkpoint of a run"):
        completed("--pretrained", tmp_path / "none.pt")


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_left_out(folder, tmp_path, prefix):
    state_dict = open_clip.create_model(f"local-dir:{folder / 'model'}").state_dict()
    torch.save({"state_dict": {prefix + name: value for name, value in state_dict.items()}}, tmp_path / "wrapped.pt")
    args = completed("--model", f"local-dir:{folder / 'model'}", "--pretrained", tmp_path / "wrapped.pt")
    loaded = load_model(args)[0].state_dict()
    assert all(torch.equal(loaded[name], state_dict[name]) for name in state_dict)


def test_the_patch_of_open_clip_is_undone(folder):
    before = open_clip.factory.load_state_dict
    load_model(completed("--pretrained", checkpoint_path(folder, "run")))
    assert open_clip.factory.load_state_dict is before


def test_python_objects_beside_tensors_are_refused_with_a_cure_that_works(folder, tmp_path):
    """As checkpoints of open_clip before 2.24 have numpy's numbers, which torch loads no more."""
    weights = open_clip.create_model(f"local-dir:{folder / 'model'}").state_dict()
    old = tmp_path / "old.pt"
    torch.save({"epoch": np.float64(3), "state_dict": weights}, old)
    model = ("--model", f"local-dir:{folder / 'model'}", "--pretrained")
    with pytest.raises(ValueError, match="it holds Python objects beside tensors") as refused:
        load_model(completed(*model, old))
    assert len(str(refused.value).splitlines()) == 1
    exec(re.search(r'python -c "(.*)"', str(refused.value))[1])
    loaded = load_model(completed(*model, f"{old}.weights"))[0].state_dict()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_a_file_that_torch_did_not_write_is_not_recommended_to_be_trusted(folder, tmp_path):
    (tmp_path / "train.csv").write_text("filepath,title\n", encoding="utf-8")
    with pytest.raises(ValueError, match="cannot be loaded: ") as refused:
        load_model(completed("--model", f"local-dir:{folder / 'model'}", "--pretrained", tmp_path / "train.csv"))
    assert "trust" not in str(refused.value)


def test_a_device_that_is_not_there_is_refused_by_name(folder):
    args = completed("--model", f"local-dir:{folder / 'model'}")
    args.device = "banana"
    with pytest.raises(ValueError, match=r"argument --device: 'banana' cannot be used .*; expected one that torch"):
        load_model(args)


def test_a_reason_is_one_line_of_bounded_length():
    assert why_not_loaded("x.pt", RuntimeError("a\n  b")) == "RuntimeError: a b"
    assert len(why_not_loaded("x.pt", RuntimeError("word " * 200))) < 330
    assert why_not_loaded("x.pt", pickle.UnpicklingError("pickle data was truncated")).startswith("UnpicklingError: ")


def test_a_sharded_checkpoint_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="is a folder, such as a sharded checkpoint; expected a file of weights"):
        load_model(completed("--model", f"local-dir:{folder / 'model'}", "--pretrained", tmp_path))


def test_the_tiny_model_is_what_these_tests_think_it_is():
    assert MODEL_CONFIG["vision_cfg"]["image_size"] == 32
    assert MODEL_CONFIG["text_cfg"]["context_length"] == 16
