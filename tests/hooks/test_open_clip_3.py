"""The hooks that only open_clip 3 needs: its loop has the loss among its arguments."""

from argparse import Namespace
from types import SimpleNamespace

import pytest
from major_version import only_open_clip_3
from open_clip_train import main as open_clip_main

from sparc_loss.hooks.hooked import hooked

pytestmark = only_open_clip_3
PLUGIN = SimpleNamespace(prepare_model=lambda model, args: model, create_loss=lambda args: ("loss", args))


def test_the_plugins_loss_takes_the_place_of_open_clips():
    args = Namespace()
    with hooked(lambda argv: args, PLUGIN):
        assert open_clip_main.create_loss(args) == ("loss", args)


def test_a_plugin_may_be_an_object_with_methods():
    class Plugin:
        def prepare_model(self, model, args):
            return model

        def create_loss(self, args):
            return self, args

    plugin, args = Plugin(), Namespace()
    with hooked(lambda argv: args, plugin):
        assert open_clip_main.create_loss(args) == (plugin, args)


def test_epochs_are_between_before_epoch_and_after_epoch(monkeypatch):
    calls = []

    def train_one_epoch(model, data, loss, epoch, optimizer, scaler, scheduler, dist_model, args, tb_writer=None):
        calls.append(("train", epoch))

    monkeypatch.setattr(open_clip_main, "train_one_epoch", train_one_epoch)
    plugin = SimpleNamespace(
        **vars(PLUGIN),
        before_epoch=lambda *given: calls.append(("before", *given)),
        after_epoch=lambda *given: calls.append(("after", *given)),
    )
    with hooked(lambda argv: Namespace(), plugin):
        open_clip_main.train_one_epoch("model", "data", "loss", 0, *["optimizer"] * 4, "args", tb_writer="writer")
        assert open_clip_main.train_one_epoch.__wrapped__ is train_one_epoch
    assert calls == [("before", "loss", 0, "args"), ("train", 0), ("after", "model", "data", 1, "args", "writer")]
    assert open_clip_main.train_one_epoch is train_one_epoch


@pytest.mark.parametrize("name", ["before_epoch", "after_epoch"])
def test_a_plugin_may_have_one_of_them_alone(monkeypatch, name):
    calls = []
    monkeypatch.setattr(open_clip_main, "train_one_epoch", lambda model, data, loss, epoch, args: None)
    plugin = SimpleNamespace(**vars(PLUGIN), **{name: lambda *given: calls.append(given)})
    with hooked(lambda argv: Namespace(), plugin):
        open_clip_main.train_one_epoch("model", "data", "loss", 4, "args")
    assert calls == [("loss", 4, "args") if name == "before_epoch" else ("model", "data", 5, "args", None)]
