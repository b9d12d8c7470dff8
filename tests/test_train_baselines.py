"""`python -m sparc_loss.train --loss filip | pacl | gloria | mgca | flair`, as real processes on the CPU."""

import pytest
from launching import TORCHRUN, assert_trained, checkpoint, checkpoint_path, train
from loading import assert_loads_without_sparc_loss

pytestmark = pytest.mark.slow

LAUNCHER = ("-m", "sparc_loss.train", "--loss")


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("filip", ("--filip-global-weight", "0.5", "--val-data", "{folder}/val.csv")),
        pytest.param("pacl", ("--precision", "amp_bf16", "--pacl-global-weight", "1"), marks=pytest.mark.exhaustive),
        pytest.param("gloria", ("--accum-freq", "2"), marks=pytest.mark.exhaustive),
    ],
)
def test_trains(folder, name, flags):
    flags = [flag.format(folder=folder) for flag in flags]
    log = train(folder, *flags, name=name, launcher=(*LAUNCHER, name))
    assert_trained(log)


HEADS = {"mgca": ("prototypes", "Prototype_loss"), "flair": ("attn.in_proj_weight", "Fine_grained_loss")}


@pytest.mark.parametrize("name", HEADS)
def test_learned_heads_train_resume_and_load_in_plain_open_clip(folder, name):
    parameter, term = HEADS[name]
    resumable = ("--lr-scheduler", "const", "--val-data", str(folder / "val.csv"))
    log = train(folder, *resumable, name=name, launcher=(*LAUNCHER, name))
    assert_trained(log, term)
    log = train(folder, *resumable, "--resume", "latest", name=name, epochs=2, launcher=(*LAUNCHER, name))
    assert "resuming checkpoint" in log

    first, second = (checkpoint(folder, name, epoch)["state_dict"] for epoch in (1, 2))
    heads = [state_dict._metadata[f"{name}_heads"]["parameters"][parameter] for state_dict in (first, second)]
    assert 0 < (heads[0] - heads[1]).abs().max() < 0.1  # trained further, not made anew
    assert_loads_without_sparc_loss(checkpoint_path(folder, name, 2), folder / "tiny.json")


@pytest.mark.parametrize("name", [pytest.param("mgca", marks=pytest.mark.exhaustive), "flair"])
def test_learned_heads_train_on_two_gloo_ranks(folder, name):
    log = train(folder, name=f"{name}-two-ranks", launcher=(*TORCHRUN, *LAUNCHER, name))
    assert_trained(log, HEADS[name][1])
    assert log.count("turning on --local-loss --gather-with-grad") == 1
