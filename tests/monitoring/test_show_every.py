"""`--sparc-show-every`: pictures while training, which goes on as if there were none."""

import csv
import io
import json
import random
import sys
import tarfile
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from launching import assert_same_weights, train
from open_clip.transform import image_transform
from open_clip_train import main as open_clip_main
from PIL import Image

from sparc_loss.monitoring import show_every
from sparc_loss.monitoring.validation_pairs import validation_pairs
from sparc_loss.plugins.sparc import SPARC
from sparc_loss.show import align, draw

pytestmark = pytest.mark.slow


@pytest.fixture
def args(args):
    args.sparc_show_every = 1
    return args


DATA = {"train": SimpleNamespace(dataloader=SimpleNamespace(num_batches=10))}


def captions_of(pairs: list) -> list[str]:
    return [caption for _, caption in pairs]


@pytest.mark.slow
def test_training_is_the_same_bit_for_bit(folder):
    val = ("--val-data", str(folder / "val.csv"), "--seed", "3")
    train(folder, *val, name="without", epochs=2)
    log = train(folder, *val, "--sparc-show-every", "1", "--sparc-probe-every", "1", name="with", epochs=2)
    assert_same_weights(folder, "without", "with", epoch=2)
    pictures = sorted((folder / "logs" / "with" / "words").iterdir())
    assert [path.name for path in pictures] == ["epoch_1.png", "epoch_2.png"]
    assert pictures[0].read_bytes() != pictures[1].read_bytes()
    assert f"What words select: {pictures[1]}" in log
    assert not (folder / "logs" / "without" / "words").exists()
    measured = (folder / "logs" / "with" / "image_dependence.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["epoch"] for line in measured] == [1, 2]
    assert log.count("Image dependence after epoch ") == 2


@pytest.mark.parametrize(("threshold", "alignment"), [(0.9, "sparse"), (None, "softmax")])
def test_the_picture_is_of_the_first_validation_pairs_with_the_losses_settings(
    model, args, tmp_path, threshold, alignment
):
    args.sparc_threshold, args.sparc_alignment = threshold, alignment
    SPARC.after_epoch(model, DATA, 3, args, None)
    with open(args.val_data, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))[:4]
    preprocess = image_transform(32, is_train=False)
    tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=16)
    pairs = [
        align(row["filepath"], row["title"], model, preprocess, tokenizer, threshold=threshold, alignment=alignment)
        for row in rows
    ]
    draw(pairs).savefig(tmp_path / "expected.png")
    shown, expected = (Image.open(tmp_path / name) for name in ("run/words/epoch_3.png", "expected.png"))
    np.testing.assert_array_equal(np.asarray(shown), np.asarray(expected))


@pytest.mark.parametrize(
    ("change", "epoch"), [({"sparc_show_every": 2}, 3), ({"rank": 1}, 2), ({"sparc_show_every": 0}, 2)]
)
def test_other_epochs_and_ranks_draw_nothing(model, args, tmp_path, change, epoch):
    SPARC.after_epoch(model, DATA, epoch, Namespace(**{**vars(args), **change}), None)
    assert not (tmp_path / "run" / "words").exists()


def as_ddp_has_it(model: torch.nn.Module) -> torch.nn.Module:
    wrapper = torch.nn.Module()
    wrapper.module = model
    return wrapper


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [as_ddp_has_it, torch.compile, lambda model: torch.compile(as_ddp_has_it(model))])
def test_a_wrapped_or_compiled_model_is_seen_through(model, args, tmp_path, wrap):
    show_every.show_validation_pairs(wrap(model), DATA, 1, args, None)
    assert (tmp_path / "run" / "words" / "epoch_1.png").exists()


def test_modes_gradients_and_random_numbers_stay(model, args):
    model.train()
    model.visual.eval()
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    show_every.show_validation_pairs(model, DATA, 1, args, None)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


def test_tensorboard_gets_the_picture_at_the_epoch(model, args, tmp_path):
    calls = []
    writer = SimpleNamespace(add_image=lambda *given, **named: calls.append((given, named)))
    show_every.show_validation_pairs(model, DATA, 2, args, writer)
    (((tag, pixels, epoch), named),) = calls
    assert (tag, epoch, named) == ("words", 2, {"dataformats": "HWC"})
    shown = np.asarray(Image.open(tmp_path / "run" / "words" / "epoch_2.png").convert("RGB"))
    np.testing.assert_array_equal(pixels, shown)


def test_wandb_gets_the_picture_at_the_step_of_the_evaluation(model, args, monkeypatch):
    logged = []
    wandb = SimpleNamespace(
        Image=lambda picture: picture.size, log=lambda *given, **named: logged.append((given, named))
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    args.wandb, args.save_logs = True, False
    show_every.show_validation_pairs(model, DATA, 2, args, None)
    (((entries,), named),) = logged
    assert list(entries) == ["words"]
    assert named == {"step": 10}  # 10 batches, 2 to a step, 2 epochs


def test_a_webdataset_is_read_as_well(args, folder, tmp_path):
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        for index in range(6):
            picture = (folder / f"val{index}.png").read_bytes()
            for suffix, content in (("png", picture), ("txt", f"caption {index}".encode())):
                entry = tarfile.TarInfo(f"{index:03d}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    args.val_data = str(tmp_path / "val.tar")
    pairs = list(validation_pairs(args, 4))
    assert captions_of(pairs) == [f"caption {index}" for index in range(4)]
    assert pairs[0][0].size == (32, 32)


def test_few_validation_pairs_are_all_of_them(args, folder, tmp_path):
    rows = (folder / "val.csv").read_text(encoding="utf-8").splitlines()[:3]
    (tmp_path / "two.csv").write_text("\n".join(rows), encoding="utf-8")
    args.val_data = str(tmp_path / "two.csv")
    assert len(list(validation_pairs(args, 4))) == 2


def test_a_pair_that_cannot_be_shown_is_left_out_and_training_goes_on(model, args, caplog, tmp_path):
    torch.nn.init.constant_(model.visual.proj, torch.nan)
    show_every.show_validation_pairs(model, DATA, 1, args, None)
    assert caplog.text.count("--sparc-show-every: a pair is left out: model gives weights that are not finite") == 4
    assert not (tmp_path / "run" / "words").exists()


@pytest.mark.parametrize("change", [{"val_data": None}, {"dataset_type": "synthetic"}])
def test_without_validation_pairs_it_is_refused(args, change):
    with pytest.raises(ValueError, match="--sparc-show-every is set without validation pairs; expected --val-data"):
        show_every.check_run(Namespace(**{**vars(args), **change}))


def test_without_the_launcher_it_is_refused(args):
    with pytest.raises(ValueError, match=r"--sparc-show-every is set; expected it off, or python -m sparc_loss.train"):
        show_every.check_run(args)


def test_without_the_extra_it_is_refused_with_the_pip_command(args, monkeypatch):
    monkeypatch.setattr(open_clip_main.train_one_epoch, "__wrapped__", None, raising=False)
    monkeypatch.setitem(sys.modules, "sparc_loss.show", None)
    with pytest.raises(ImportError, match=r"--sparc-show-every: .*; pip install 'sparc-loss\[show\]'"):
        show_every.check_run(args)


def test_validation_data_that_cannot_be_read_fails_before_training(args, monkeypatch, tmp_path):
    monkeypatch.setattr(open_clip_main.train_one_epoch, "__wrapped__", None, raising=False)
    (tmp_path / "val.csv").write_text("filepath\ttitle\nnone.png\ta dog\n", encoding="utf-8")
    args.val_data = str(tmp_path / "val.csv")
    with pytest.raises(ValueError, match=r"--val-data: none\.png cannot be read"):
        show_every.check_run(args)


def test_with_sharded_weights_it_is_refused(args, monkeypatch):
    monkeypatch.setattr(open_clip_main.train_one_epoch, "__wrapped__", None, raising=False)
    args.fsdp = True
    with pytest.raises(ValueError, match="--sparc-show-every is set with --fsdp; expected it off"):
        show_every.check_run(args)
