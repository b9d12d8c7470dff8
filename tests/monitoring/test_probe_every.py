"""`--sparc-probe-every`: does the loss look at the image? Asked while training, which goes on as if it were not."""

import json
import sys
from argparse import Namespace
from types import SimpleNamespace

import open_clip
import pytest
import torch
from launching import MODEL_CONFIG, train
from open_clip_train import main as open_clip_main

from sparc_loss import surface_embeddings
from sparc_loss.evaluation import image_dependence
from sparc_loss.monitoring import probe_every
from sparc_loss.monitoring.show_every import draw_validation_pairs
from sparc_loss.monitoring.validation_pairs import validation_pairs
from sparc_loss.plugins.sparc import SPARC

pytestmark = pytest.mark.slow


@pytest.fixture
def args(args):
    args.sparc_probe_every = 1
    return args


DATA = {"train": SimpleNamespace(dataloader=SimpleNamespace(num_batches=10))}


def lines(tmp_path) -> list[dict]:
    return [
        json.loads(line)
        for line in (tmp_path / "run" / "image_dependence.jsonl").read_text(encoding="utf-8").splitlines()
    ]


@pytest.mark.parametrize(("scale", "threshold", "alignment"), [(None, 0.9, "sparse"), (4.0, None, "softmax")])
def test_it_measures_the_first_validation_pairs_with_the_losses_settings(
    model, args, tmp_path, scale, threshold, alignment
):
    args.sparc_fine_grained_scale, args.sparc_threshold, args.sparc_alignment = scale, threshold, alignment
    SPARC.after_epoch(model, DATA, 3, args, None)
    model.eval()
    preprocess = open_clip.transform.image_transform(32, is_train=False)
    images, captions = zip(*validation_pairs(args, 8), strict=True)
    patches, _ = model.encode_patches(torch.stack([preprocess(image) for image in images]))
    tokens, mask = model.encode_tokens(open_clip.get_tokenizer("ViT-B-32", context_length=16)(list(captions)))
    expected = image_dependence(
        *(patches, tokens, mask, model.logit_scale.exp() if scale is None else scale),
        threshold=threshold,
        alignment=alignment,
    )
    (figures,) = lines(tmp_path)
    assert figures["epoch"] == 3
    for name in ("right", "shuffled", "constant"):
        for measure, value in getattr(expected, name)._asdict().items():
            assert figures[f"{name}_{measure}"] == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize(
    ("change", "epoch"), [({"sparc_probe_every": 2}, 3), ({"rank": 1}, 2), ({"sparc_probe_every": 0}, 2)]
)
def test_other_epochs_and_ranks_measure_nothing(model, args, tmp_path, change, epoch):
    SPARC.after_epoch(model, DATA, epoch, Namespace(**{**vars(args), **change}), None)
    assert not (tmp_path / "run" / "image_dependence.jsonl").exists()


def test_it_measures_in_evaluation_mode(args, tmp_path):
    """Patch dropout would leave patches out in training mode."""
    config = {**MODEL_CONFIG, "vision_cfg": {**MODEL_CONFIG["vision_cfg"], "patch_dropout": 0.5}}
    model = open_clip.CLIP(**config)
    model.visual.preprocess_cfg = {"size": (32, 32)}
    surface_embeddings(model, open_clip.get_tokenizer("ViT-B-32", context_length=16)).train()
    expected = probe_every.measure_validation_pairs(model.eval(), args)
    assert probe_every.measure_validation_pairs(model.train(), args) == expected


@pytest.mark.parametrize("precision", ["amp", "amp_bf16", "bf16", "fp16", "pure_bf16", "pure_fp16"])
def test_it_measures_and_draws_in_the_precision_of_the_training(args, folder, precision):
    def created(precision):
        torch.manual_seed(0)
        model = open_clip.create_model(f"local-dir:{folder / 'model'}", precision=precision)
        return surface_embeddings(model, open_clip.get_tokenizer("ViT-B-32", context_length=16)).train()

    expected = probe_every.measure_validation_pairs(created("fp32"), args)
    args.precision = precision
    model = created(precision)
    measured = probe_every.measure_validation_pairs(model, args)
    assert measured.right.loss == pytest.approx(expected.right.loss, rel=0.1)
    assert draw_validation_pairs(model, args) is not None


@pytest.mark.slow
def test_a_training_in_bfloat16_measures_and_draws(folder):
    flags = ("--precision", "bf16", "--val-data", str(folder / "val.csv"))
    log = train(folder, *flags, "--sparc-probe-every", "1", "--sparc-show-every", "1", name="bf16")
    assert "Traceback" not in log
    assert len((folder / "logs" / "bf16" / "image_dependence.jsonl").read_text(encoding="utf-8").splitlines()) == 1
    assert (folder / "logs" / "bf16" / "words" / "epoch_1.png").exists()


def test_modes_gradients_and_random_numbers_stay(model, args):
    model.train()
    model.visual.eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    probe_every.probe_validation_pairs(model, DATA, 1, args, None)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_tensorboard_and_wandb_get_every_figure(model, args, tmp_path, monkeypatch):
    scalars, logged = {}, []
    writer = SimpleNamespace(add_scalar=lambda name, value, epoch: scalars.update({name: (value, epoch)}))
    monkeypatch.setitem(
        sys.modules, "wandb", SimpleNamespace(log=lambda entries, step: logged.append((entries, step)))
    )
    args.wandb = True
    probe_every.probe_validation_pairs(model, DATA, 2, args, writer)
    ((entries, step),) = logged
    assert step == 10
    (figures,) = lines(tmp_path)
    assert entries == {f"image_dependence/{name}": value for name, value in figures.items() if name != "epoch"}
    assert scalars == {name: (value, 2) for name, value in entries.items()}


def test_what_cannot_be_measured_is_a_warning_and_training_goes_on(model, args, caplog, tmp_path):
    torch.nn.init.constant_(model.visual.proj, torch.nan)
    assert probe_every.probe_validation_pairs(model, DATA, 1, args, None) is None
    assert "--sparc-probe-every: nothing is measured after epoch 1: patch_features has values that" in caplog.text
    assert not (tmp_path / "run" / "image_dependence.jsonl").exists()


def test_a_last_pair_alone_is_left_out(model, args, monkeypatch):
    monkeypatch.setattr(probe_every, "BATCH_SIZE", 7)
    monkeypatch.setattr(probe_every, "PROBED_PAIRS", 8)
    whole = probe_every.probe_validation_pairs(model, DATA, 1, args, None)
    monkeypatch.setattr(probe_every, "PROBED_PAIRS", 7)
    assert probe_every.probe_validation_pairs(model, DATA, 1, args, None) == whole


def test_a_single_validation_pair_is_refused(args, folder, monkeypatch, tmp_path):
    monkeypatch.setattr(open_clip_main.train_one_epoch, "__wrapped__", None, raising=False)
    (tmp_path / "one.csv").write_text("\n".join((folder / "val.csv").read_text(encoding="utf-8").splitlines()[:2]))
    args.val_data = str(tmp_path / "one.csv")
    with pytest.raises(ValueError, match="--sparc-probe-every is set with 1 validation image; expected 2 or more"):
        probe_every.check_run(args)


def test_without_validation_pairs_or_the_launcher_it_is_refused(args):
    with pytest.raises(ValueError, match=r"--sparc-probe-every is set; expected it off, or python -m"):
        probe_every.check_run(args)
    args.val_data = None
    with pytest.raises(ValueError, match="--sparc-probe-every is set without validation pairs; expected --val-data"):
        probe_every.check_run(args)
