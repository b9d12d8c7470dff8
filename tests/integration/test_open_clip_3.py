"""The hooks: which names of open_clip are replaced, and that they come back."""

from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from open_clip_train import main as open_clip_main

from sparc_loss.integration.open_clip_3 import hooked

NAMES = ("parse_args", "create_model_and_transforms", "create_loss")


def current_names() -> list:
    return [*(getattr(open_clip_main, name) for name in NAMES), torch.nn.parallel.DistributedDataParallel]


@pytest.fixture
def plugin():
    return SimpleNamespace(
        prepare_model=lambda model, args: ("prepared", model, args), create_loss=lambda args: ("loss", args)
    )


def test_the_names_come_back_after_the_run_and_after_a_failure(plugin):
    before = current_names()
    with hooked(lambda argv: Namespace(), plugin):
        assert all(now is not then for now, then in zip(current_names(), before, strict=True))
    assert current_names() == before

    with pytest.raises(ZeroDivisionError), hooked(lambda argv: Namespace(), plugin):
        raise ZeroDivisionError
    assert current_names() == before


def test_nothing_else_of_open_clips_main_is_replaced(plugin):
    before = dict(vars(open_clip_main))
    with hooked(lambda argv: Namespace(), plugin):
        replaced = {name for name, value in vars(open_clip_main).items() if value is not before[name]}
    assert replaced == set(NAMES)


def test_without_a_plugin_model_and_loss_stay_open_clips(plugin):
    create_loss = open_clip_main.create_loss
    with hooked(lambda argv: Namespace(), None):
        assert open_clip_main.create_loss is create_loss


def test_only_the_first_model_is_prepared_the_second_is_a_teacher(plugin, monkeypatch):
    monkeypatch.setattr(open_clip_main, "create_model_and_transforms", lambda name: (name, "train", "val"))
    args = Namespace()
    with hooked(lambda argv: args, plugin):
        open_clip_main.parse_args([])
        assert open_clip_main.create_model_and_transforms("student") == (("prepared", "student", args), "train", "val")
        assert open_clip_main.create_model_and_transforms("teacher") == ("teacher", "train", "val")


def test_what_is_replaced_keeps_the_original_in_wrapped(plugin):
    originals = [getattr(open_clip_main, name) for name in NAMES]
    with hooked(lambda argv: Namespace(), plugin):
        assert [getattr(open_clip_main, name).__wrapped__ for name in NAMES] == originals


def test_a_second_run_inside_the_first_is_refused(plugin):
    with (
        hooked(lambda argv: Namespace(), plugin),
        pytest.raises(RuntimeError, match="hooked already; expected one run at a time"),
        hooked(lambda argv: Namespace(), plugin),
    ):
        pass


def test_after_epoch_follows_each_epoch_with_what_evaluate_is_given(plugin, monkeypatch):
    calls = []

    def train_one_epoch(model, data, loss, epoch, optimizer, scaler, scheduler, dist_model, args, tb_writer=None):
        calls.append(("train", epoch))

    monkeypatch.setattr(open_clip_main, "train_one_epoch", train_one_epoch)
    plugin.after_epoch = lambda *given: calls.append(given)
    with hooked(lambda argv: Namespace(), plugin):
        open_clip_main.train_one_epoch("model", "data", "loss", 0, *["optimizer"] * 4, "args", tb_writer="writer")
        assert open_clip_main.train_one_epoch.__wrapped__ is train_one_epoch
    assert calls == [("train", 0), ("model", "data", 1, "args", "writer")]
    assert open_clip_main.train_one_epoch is train_one_epoch
