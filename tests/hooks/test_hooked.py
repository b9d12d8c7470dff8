"""The hooks: which names of open_clip are replaced, and that they come back; in every major version of it."""

from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from major_version import MAJOR_VERSION
from open_clip_train import main as open_clip_main
from open_clip_train import zero_shot

from sparc_loss.hooks.hooked import hooked

NAMES = ("parse_args", "create_model_and_transforms", "create_loss" if MAJOR_VERSION == 3 else "create_task")


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
    before = {name: getattr(open_clip_main, name) for name in NAMES[1:]}
    with hooked(lambda argv: Namespace(), None):
        assert {name: getattr(open_clip_main, name) for name in NAMES[1:]} == before


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


def failing_accuracy(output, target, topk=(1,)):
    raise TypeError("only 0-dimensional arrays can be converted to Python scalars")


def test_the_zero_shot_accuracy_is_replaced_only_where_it_fails(monkeypatch):
    def working_accuracy(output, target, topk=(1,)):
        return [1.0]

    for accuracy, replaced in ((working_accuracy, False), (failing_accuracy, True)):
        monkeypatch.setattr(zero_shot, "accuracy", accuracy)
        with hooked(lambda argv: Namespace(), None):
            assert (zero_shot.accuracy is not accuracy) == replaced
        assert zero_shot.accuracy is accuracy


def test_the_repaired_zero_shot_accuracy_counts_the_targets_among_the_highest(monkeypatch):
    monkeypatch.setattr(zero_shot, "accuracy", failing_accuracy)
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.2], [0.8, 0.1, 0.2, 0.3], [0.0, 0.1, 0.2, 0.3]])
    with hooked(lambda argv: Namespace(), None):
        assert zero_shot.accuracy(scores, torch.tensor([2, 0, 1]), topk=(1, 2, 3)) == [1, 2, 3]
