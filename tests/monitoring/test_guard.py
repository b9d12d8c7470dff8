"""Nothing of a plug-in between two epochs ends a run."""

import json
from argparse import Namespace
from types import SimpleNamespace

import pytest
from launching import checkpoint_path, data_flags, run_python
from open_clip_train import main as open_clip_main

from sparc_loss.hooks import hooked as hooks
from sparc_loss.hooks.epoch import Epoch
from sparc_loss.monitoring.guard import training_goes_on
from sparc_loss.plugins.sparc import SPARC

DATA = {"train": SimpleNamespace(dataloader=SimpleNamespace(num_batches=10))}
FAILING = """
import sys
from sparc_loss.monitoring import probe_every, show_every
from sparc_loss.train import main

def fail(*given):
    raise OSError("no space left on device")

probe_every._report = show_every._report = fail
sys.exit(main(sys.argv[1:]))
"""


def test_an_error_becomes_a_warning_with_its_traceback(caplog):
    with training_goes_on("The work"):
        raise KeyError("missing")
    assert "The work failed; training goes on" in caplog.text
    assert "Traceback" in caplog.text
    assert "KeyError: 'missing'" in caplog.text


def test_an_interruption_is_not_held_back():
    with pytest.raises(KeyboardInterrupt), training_goes_on("The work"):
        raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["before_epoch", "after_epoch", "try_after_epoch"])
def test_a_call_of_any_plugin_that_fails_leaves_the_epoch_to_be_trained(monkeypatch, caplog, name):
    trained = []
    monkeypatch.setattr(open_clip_main, "train_one_epoch", lambda epoch: trained.append(epoch))
    monkeypatch.setattr(
        hooks,
        "module_of_major_version",
        lambda version: SimpleNamespace(
            replacements_for_the_loss=lambda plugin: {},
            of_epoch=lambda given: Epoch("loss", "model", DATA, given["epoch"], "args", None),
        ),
    )

    def fail(*given):
        raise RuntimeError("broken plug-in")

    with hooks.hooked(lambda argv: Namespace(), SimpleNamespace(**{name: fail})):
        open_clip_main.train_one_epoch(epoch=0)
        open_clip_main.train_one_epoch(epoch=1)
    assert trained == [0, 1]
    assert caplog.text.count("RuntimeError: broken plug-in") == (1 if name == "try_after_epoch" else 2)
    assert f"The plug-in's {name} failed; training goes on" in caplog.text


@pytest.mark.slow
def test_what_fails_after_an_epoch_is_a_warning_and_every_checkpoint_is_written(folder):
    flags = ("--loss", "sparc", "--val-data", str(folder / "val.csv"))
    every = ("--sparc-probe-every", "1", "--sparc-show-every", "1")
    finished = run_python("-c", FAILING, *data_flags(folder, name="failing", epochs=2), *flags, *every)
    assert finished.returncode == 0, finished.stdout
    assert all(checkpoint_path(folder, "failing", epoch).exists() for epoch in (1, 2))
    for flag in ("--sparc-probe-every", "--sparc-show-every"):
        assert all(f"{flag} after epoch {epoch} failed; training goes on" in finished.stdout for epoch in (1, 2))
    assert finished.stdout.count("OSError: no space left on device") == 4


@pytest.mark.parametrize("flag", ["probe", "show"])
def test_what_will_fail_after_an_epoch_is_told_before_training(model, args, caplog, tmp_path, flag):
    setattr(args, f"sparc_{flag}_every", 1)
    args.model = "local-dir:/nowhere"  # whose tokenizer cannot be made
    SPARC.try_after_epoch(model, DATA, args)
    assert f"--sparc-{flag}-every, tried before training, failed; training goes on" in caplog.text
    assert "Traceback" in caplog.text


def test_the_trial_writes_nothing(model, args, caplog, tmp_path):
    args.sparc_probe_every = args.sparc_show_every = 1
    SPARC.try_after_epoch(model, DATA, args)
    assert list((tmp_path / "run").iterdir()) == []
    assert caplog.text == ""
    SPARC.after_epoch(model, DATA, 1, args, None)
    assert json.loads((tmp_path / "run" / "image_dependence.jsonl").read_text(encoding="utf-8"))["epoch"] == 1
