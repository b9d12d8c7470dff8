"""The hooks that only open_clip 4 needs: a plug-in's loss inside its tasks."""

import copy
from argparse import Namespace
from types import SimpleNamespace

import open_clip
import pytest
import torch
from major_version import only_open_clip_4
from open_clip_train import main as open_clip_main
from tiny_models import ToyTokenizer, captions, clip, coca, images_for
from torch import nn

from sparc_loss import SparcLoss, surface_embeddings
from sparc_loss.diagnostics import NAMES, alignment_diagnostics
from sparc_loss.hooks.hooked import hooked, module_of_major_version

pytestmark = only_open_clip_4
EXTRA = {"patch_features", "token_features", "token_mask"}


@pytest.fixture
def with_loss():
    return module_of_major_version(open_clip.__version__).with_loss


class Recording(nn.Module):
    """A loss that keeps what it is given."""

    def forward(self, output_dict: bool, **given: torch.Tensor) -> dict[str, torch.Tensor]:
        self.given = given
        return {"contrastive_loss": given["patch_features"].sum(), "share": torch.tensor(1e6)}


def batch_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {"image": images_for(model), "text": captions()}


def test_the_task_is_open_clips_own_with_the_plugins_loss(monkeypatch):
    args = Namespace()
    loss, task = Recording(), open_clip.CLIPTask(nn.Linear(2, 2))
    calls = []
    monkeypatch.setattr(open_clip_main, "create_task", lambda *given, **named: calls.append((given, named)) or task)
    plugin = SimpleNamespace(prepare_model=lambda model, args: model, create_loss=lambda given: given is args and loss)
    with hooked(lambda argv: args, plugin):
        assert open_clip_main.create_task(args, "model", naflex_data_config="config") is task
    assert calls == [((args, "model"), {"naflex_data_config": "config"})]
    assert task.loss is loss


def test_only_what_ends_in_loss_is_summed(with_loss):
    model = surface_embeddings(clip(), ToyTokenizer())
    losses, _ = with_loss(open_clip.CLIPTask(model), Recording).train()(batch_of(model))
    assert torch.equal(losses["loss"], losses["contrastive_loss"])


@pytest.mark.parametrize("accumulates", [False, True])
def test_a_coca_task_hands_over_all_that_the_model_returns(with_loss, accumulates):
    model = surface_embeddings(coca(init_logit_bias=1.0), ToyTokenizer()).train()
    task, batch = with_loss(open_clip.CoCaTask(model), Recording), batch_of(model)
    assert isinstance(task, open_clip.CoCaTask)
    if accumulates:
        output = model(**batch)
        apart = {name: output.pop(name) for name in ("logit_scale", "logit_bias")}
        task.compute_accum_loss(output, apart, [batch])
    else:
        task.train()(batch)
    features = {"image_features", "text_features", "logit_scale", "logits", "labels"}
    assert set(task.loss.given) == features | EXTRA
    assert task.loss.given["logits"].shape[1] == task.loss.given["labels"].shape[1]


def test_a_task_without_a_loss_is_refused_by_name(with_loss):
    task = open_clip.GenLipTask(GenerativeModel())
    with pytest.raises(TypeError, match="trains this model by a GenLipTask, which calls no loss; expected a task"):
        with_loss(task, Recording)


class GenerativeModel(nn.Module):
    pad_id = 0


def test_epochs_are_between_before_epoch_and_after_epoch(monkeypatch):
    calls = []

    def train_one_epoch(state, data, args, tb_writer=None):
        calls.append(("train", state.epoch))

    monkeypatch.setattr(open_clip_main, "train_one_epoch", train_one_epoch)
    plugin = SimpleNamespace(
        prepare_model=None,
        create_loss=None,
        before_epoch=lambda *given: calls.append(("before", *given)),
        after_epoch=lambda *given: calls.append(("after", *given)),
    )
    state = SimpleNamespace(epoch=0, task=SimpleNamespace(trainable_module="model", loss="loss"))
    with hooked(lambda argv: Namespace(), plugin):
        open_clip_main.train_one_epoch(state, "data", "args", tb_writer="writer")
        assert open_clip_main.train_one_epoch.__wrapped__ is train_one_epoch
    assert calls == [("before", "loss", 0, "args"), ("train", 0), ("after", "model", "data", 1, "args", "writer")]


# Moving averages, which open_clip's tasks have but its command line does not yet


def test_the_moving_average_of_a_surfaced_model_follows_it_and_loads_in_a_plain_one(with_loss):
    plain = clip(output_dict=True)
    model = surface_embeddings(copy.deepcopy(plain), ToyTokenizer())
    task = with_loss(open_clip.CLIPTask(model), SparcLoss).setup_ema(decay=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = copy.deepcopy(model.state_dict())
    losses, _ = task.train()(batch_of(model))
    losses["loss"].backward()
    optimizer.step()
    task.update_ema()

    averaged = task.state_dict()["state_dict_ema"]
    expected = {name: (first[name] + value) / 2 for name, value in model.state_dict().items()}
    torch.testing.assert_close(dict(averaged), expected)
    plain.load_state_dict(averaged, strict=True)
    output = task.eval()(batch_of(model))
    torch.testing.assert_close(output["image_features"], plain.eval()(**batch_of(model))["image_features"])
    assert not EXTRA & set(output)


# Metrics


def test_metrics_are_in_the_dictionary_that_is_logged(with_loss):
    model = surface_embeddings(clip(), ToyTokenizer())
    losses, _ = with_loss(open_clip.CLIPTask(model), lambda: SparcLoss(diagnostics=True)).train()(batch_of(model))
    output = model.train()(**batch_of(model))
    expected = alignment_diagnostics(output["patch_features"], output["token_features"], output["token_mask"])
    assert {name: losses[name] for name in NAMES} == expected
    assert torch.equal(losses["loss"], losses["contrastive_loss"] + losses["fine_grained_loss"])
