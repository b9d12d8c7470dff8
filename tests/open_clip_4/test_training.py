"""`python -m sparc_loss.train` with open_clip 4, as real processes: what test_train.py, run with it too, has not."""

import pytest
import torch
from launching import (
    SPARC,
    TORCHRUN,
    assert_same_weights,
    assert_trained,
    checkpoint,
    checkpoint_path,
    data_flags,
    logged_losses,
    run_python,
    train,
)
from loading import assert_loads_without_sparc_loss
from major_version import only_open_clip_4

from sparc_loss.diagnostics import NAMES

pytestmark = only_open_clip_4
LAUNCHER = ("-m", "sparc_loss.train", "--loss")
ALL_AT_ONCE = ("--precision", "amp_bf16", "--accum-freq", "2", "--grad-checkpointing")


@pytest.mark.parametrize(
    ("launcher", "flags"),
    [
        pytest.param(SPARC, ("--precision", "fp32"), id="fp32"),
        pytest.param(SPARC, ALL_AT_ONCE, id="amp_bf16, accumulating, checkpointing"),
        pytest.param((*TORCHRUN, *SPARC), ALL_AT_ONCE, id="DDP"),
        pytest.param((*TORCHRUN, *SPARC), ("--fsdp", "--precision", "fp32"), id="FSDP2"),
        pytest.param((*TORCHRUN, *SPARC), ("--fsdp", *ALL_AT_ONCE), id="FSDP2, amp_bf16, accumulating, checkpointing"),
        *(pytest.param((*TORCHRUN, *LAUNCHER, name), ("--fsdp",), id=f"FSDP2, {name}") for name in ("filip", "pacl")),
        pytest.param((*TORCHRUN, *LAUNCHER, "gloria"), ("--fsdp",), id="FSDP2, gloria"),
        pytest.param((*LAUNCHER, "mgca"), ALL_AT_ONCE, id="mgca"),
        pytest.param((*LAUNCHER, "flair"), ("--precision", "amp_bf16", "--grad-checkpointing"), id="flair"),
    ],
)
def test_trains_and_its_checkpoint_loads_without_sparc_loss(folder, launcher, flags, request):
    name = request.node.callspec.id.replace(", ", "-")
    flags = (*flags, *(("--filip-global-weight", "1") if "filip" in launcher else ()))
    flags = (*flags, *(("--pacl-global-weight", "1") if "pacl" in launcher else ()))
    assert_trained(train(folder, *flags, name=name, launcher=launcher))
    assert_loads_without_sparc_loss(checkpoint_path(folder, name), folder / "tiny.json")


@pytest.mark.parametrize("strategy", ["model", "step"])
def test_compiles_by_the_other_strategies_too(folder, strategy):
    flags = ("--torchcompile", "--torchcompile-strategy", strategy, "--precision", "fp32")
    assert_trained(train(folder, *flags, name=f"compiled-{strategy}"))


def test_siglip_trains_under_fsdp2_with_its_bias(folder):
    log = train(folder, "--fsdp", "--siglip", name="fsdp-siglip", launcher=(*TORCHRUN, *SPARC))
    assert_trained(log)
    assert checkpoint(folder, "fsdp-siglip")["state_dict"]["logit_bias"].shape == ()
    assert_loads_without_sparc_loss(checkpoint_path(folder, "fsdp-siglip"), folder / "tiny.json", init_logit_bias=0.0)


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_fsdp2_resumes_from_its_checkpoints(folder, kind):
    flags = ("--fsdp", "--fsdp-checkpoint", kind, "--lr-scheduler", "const", "--save-most-recent")
    train(folder, *flags, name=f"resumed-{kind}", launcher=(*TORCHRUN, *SPARC))
    log = train(folder, *flags, "--resume", "latest", name=f"resumed-{kind}", epochs=2, launcher=(*TORCHRUN, *SPARC))
    assert_trained(log)
    assert "(epoch 1)" in log
    assert "Start epoch 1" in log
    assert "Start epoch 0" not in log


def test_ranks_train_the_same_weights_under_ddp_and_fsdp2(folder):
    # float32 sums in other orders; and SGD, because Adam makes much of the sign of a gradient near zero.
    flags = ("--precision", "fp32", "--opt", "timm/sgd", "--lr", "0.1", "--seed", "1")
    weights = []
    for name, further in (("by-ddp", ()), ("by-fsdp", ("--fsdp",))):
        train(folder, *flags, *further, name=name, launcher=(*TORCHRUN, *SPARC))
        weights.append(checkpoint(folder, name)["state_dict"])
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


def test_metrics_are_logged_beside_the_loss_and_are_no_part_of_it(folder):
    flags = ("--precision", "fp32", "--seed", "2")
    log = train(folder, *flags, name="measured")
    for name in NAMES:
        values = logged_losses(log, name.capitalize())
        assert values
        assert all(0 <= value <= 1 for value in values)
    contrastive, fine_grained, total = (
        logged_losses(log, term)[0] for term in ("Contrastive_loss", "Fine_grained_loss", "Loss")
    )
    assert total == pytest.approx(contrastive + fine_grained, rel=1e-3)

    without = train(folder, *flags, "--no-sparc-metrics", name="unmeasured")
    assert not any(logged_losses(without, name.capitalize()) for name in NAMES)
    assert_same_weights(folder, "measured", "unmeasured")


@pytest.mark.parametrize(
    ("loss", "flags", "message"),
    [
        ("mgca", (), "--fsdp is set; expected it off with --loss mgca: FSDP2 gathers a checkpoint into a new dict"),
        (
            "sparc",
            ("--sparc-show-every", "1", "--val-data", "{folder}/val.csv"),
            "--sparc-show-every is set with --fsdp; expected it off",
        ),
    ],
)
def test_what_sharded_weights_do_not_allow_is_refused(folder, loss, flags, message):
    flags = [flag.format(folder=folder) for flag in flags]
    finished = run_python(*LAUNCHER, loss, *data_flags(folder, name=f"refused-{loss}"), "--fsdp", *flags)
    assert finished.returncode != 0
    assert f"error: {message}" in finished.stdout
