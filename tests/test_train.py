"""`python -m sparc_loss.train`, as real processes on the CPU."""

import functools
import http.server
import json
import logging
import math
import shutil
import threading
from argparse import ArgumentParser, Namespace

import pytest
import torch
from launching import (
    COCA_CONFIG,
    MODEL_CONFIG,
    RESNET_CONFIG,
    SPARC,
    STOCK,
    checkpoint,
    checkpoint_path,
    data_flags,
    logged_losses,
    run_python,
    train,
    write_model,
    write_tiny_data,
)
from loading import assert_loads_without_sparc_loss
from major_version import only_open_clip_3
from open_clip import CLIP, CoCa
from open_clip_train import main as open_clip_main

from sparc_loss import train as launcher

LAUNCHER = ("-m", "sparc_loss.train")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    write_tiny_data(folder)
    return folder


@pytest.fixture(scope="module")
def address(folder):
    """Where a server gives the folder's files."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = lambda *given: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("loss", ["clip", "sparc"])
def test_addresses_that_stock_open_clip_trains_on_are_taken(folder, address, loss, monkeypatch):
    """pandas opens addresses, and fsspec, which reads checkpoints, knows the home folder."""
    home = {"HOME": str(folder)}
    csv = (
        "--dataset-type",
        "csv",
        "--train-data",
        f"{address}/train.csv",
        "--val-data",
        (folder / "val.csv").as_uri(),
    )
    name = f"addresses-{loss}"
    assert "image_to_text_R@1" in train(folder, "--loss", loss, *csv, name=name, launcher=LAUNCHER, env=home)
    resume = ("--train-data", "~/train.csv", f"--resume=~/logs/{name}/checkpoints/epoch_1.pt")
    log = train(folder, "--loss", loss, *resume, name=f"{name}-on", epochs=2, launcher=LAUNCHER, env=home)
    assert "resuming checkpoint" in log


def refused(capsys, folder, name: str, *flags: str) -> str:
    """The one line of error of a command that must leave nothing behind."""
    with pytest.raises(SystemExit) as ended:
        launcher.main([*data_flags(folder, name=name), *flags])
    assert ended.value.code == 2
    assert not (folder / "logs" / name).exists()
    return capsys.readouterr().err.strip().splitlines()[-1]


UNCOVERED = {**MODEL_CONFIG, "vision_cfg": {"timm_model_name": "test_resnet"}}
REFUSED = {
    "more negatives than images": (
        ("--loss", "sparc", "--sparc-image-negatives", "8"),
        "--sparc-image-negatives is 8 with batches of 8 pairs on each process",
    ),
    "a tower that is not covered": (
        ("--loss", "sparc", "--model", "UNCOVERED"),
        "model.visual is a TimmModel with a ResNet trunk; patch embeddings are known for",
    ),
    "that tower with a baseline": (
        ("--loss", "filip", "--model", "UNCOVERED"),
        "model.visual is a TimmModel with a ResNet trunk; patch embeddings are known for",
    ),
    "a probe without pairs": (
        ("--loss", "sparc", "--sparc-probe-every", "1"),
        "--sparc-probe-every is set without validation pairs; expected --val-data with captions",
    ),
    "pictures without pairs": (
        ("--loss", "sparc", "--sparc-show-every", "1"),
        "--sparc-show-every is set without validation pairs; expected --val-data with captions",
    ),
    "fewer pairs than a batch": (
        ("--loss", "clip", "--batch-size", "64"),
        "has 32 pairs for 1 process; expected at least --batch-size 64 x --accum-freq 1 for each",
    ),
    "fewer pairs than accumulated batches": (
        ("--loss", "sparc", "--batch-size", "8", "--accum-freq", "5"),
        "has 32 pairs for 1 process; expected at least --batch-size 8 x --accum-freq 5 for each",
    ),
    "a checkpoint that is not there": (
        ("--loss", "clip", "--resume", "~/none.pt"),
        "argument --resume: there is no file '~/none.pt'; expected a checkpoint, or latest",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_flags_tell_is_refused_before_anything_is_written(folder, capsys, case):
    flags, message = REFUSED[case]
    if not (folder / "uncovered").exists():
        write_model(folder / "uncovered", UNCOVERED)
    flags = [f"local-dir:{folder / 'uncovered'}" if flag == "UNCOVERED" else flag for flag in flags]
    assert message in refused(capsys, folder, "refused", *flags)


@only_open_clip_3
def test_metrics_that_open_clip_3_would_add_up_are_refused_before_anything_is_written(folder, capsys):
    line = refused(capsys, folder, "metrics", "--loss", "sparc", "--sparc-diagnostics")
    assert "--sparc-diagnostics is set; expected it off with open_clip 3" in line


def test_pairs_are_shared_among_the_processes(folder, capsys, monkeypatch):
    for name, value in (("WORLD_SIZE", "8"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    line = refused(capsys, folder, "shared", "--loss", "clip")
    assert "has 32 pairs for 8 processes; expected at least --batch-size 8 x --accum-freq 1 for each" in line


def test_a_refused_command_leaves_the_loggers_and_open_clip_as_they_were(folder, capsys):
    before = logging.getLogger().handlers[:], open_clip_main.parse_args, open_clip_main.train_one_epoch
    refused(capsys, folder, "untouched", "--loss", "sparc", "--sparc-image-negatives", "8")
    assert (logging.getLogger().handlers, open_clip_main.parse_args, open_clip_main.train_one_epoch) == before


def assert_trained(log: str) -> None:
    for term in ("Contrastive_loss", "Fine_grained_loss"):
        losses = logged_losses(log, term)
        assert losses, log
        assert all(math.isfinite(loss) and loss > 0 for loss in losses)


def test_trains_with_image_negatives(folder):
    flags = ("--sparc-image-negatives", "1", "--sparc-fine-grained-weight", "0", "--accum-freq", "2")
    losses = logged_losses(train(folder, *flags, name="image-negatives"), "Image_contrastive_loss")
    assert losses
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)


def assert_same_weights(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    assert differing == []


@pytest.mark.parametrize(
    "flags",
    [
        ("--precision", "fp32"),
        ("--precision", "amp_bf16"),
        ("--accum-freq", "2"),
        ("--siglip",),
        ("--grad-checkpointing",),
        ("--torchcompile",),
        pytest.param(
            ("--lock-image", "--lock-text", "--lock-text-freeze-layer-norm"),
            marks=pytest.mark.skipif(
                not hasattr(CLIP, "lock_text_tower"), reason="this open_clip locks the text tower of no CLIP"
            ),
        ),
        ("--lock-image", "--lock-image-unlocked-groups", "1", "--force-custom-text"),
        ("--force-patch-dropout", "0.5", "--force-image-size", "24", "--force-context-length", "12"),
        ("--sparc-alignment", "softmax", "--sparc-reduction", "sample", "--sparc-tokens", "all"),
        ("--sparc-threshold", "0.5", "--sparc-fine-grained-scale", "10"),
    ],
    ids=lambda flags: " ".join(flags),
)
def test_trains(folder, flags):
    assert_trained(train(folder, *flags, name="-".join(flags).replace("--", "")))


def test_validation_data_is_evaluated_by_the_models_own_forward(folder):
    log = train(folder, "--val-data", str(folder / "val.csv"), name="val")
    assert "image_to_text_R@1" in log


FEW_CLASSES = """
import sys
from open_clip_train import zero_shot
from sparc_loss.train import main

zero_shot.IMAGENET_CLASSNAMES = zero_shot.IMAGENET_CLASSNAMES[:6]
zero_shot.OPENAI_IMAGENET_TEMPLATES = zero_shot.OPENAI_IMAGENET_TEMPLATES[:2]
sys.exit(main(sys.argv[1:]))
"""


def test_zero_shot_classification_after_an_epoch_does_not_cost_its_checkpoint(folder):
    """With numpy 2.4 and newer open_clip's own accuracy fails."""
    for index in range(6):
        (folder / "imagenet" / str(index)).mkdir(parents=True)
        shutil.copy(folder / f"val{index}.png", folder / "imagenet" / str(index))
    flags = ("--loss", "sparc", "--imagenet-val", str(folder / "imagenet"), "--zeroshot-frequency", "1")
    finished = run_python("-c", FEW_CLASSES, *data_flags(folder, name="zero-shot"), *flags)
    assert finished.returncode == 0, finished.stdout
    assert "imagenet-zeroshot-val-top1" in finished.stdout
    assert checkpoint_path(folder, "zero-shot").exists()


def test_distills_from_a_teacher(folder):
    teacher = ("--distill-model", f"local-dir:{folder / 'model'}", "--distill-pretrained", "ignored")
    log = train(folder, *teacher, name="distill")
    assert_trained(log)
    assert logged_losses(log, "Distill_loss")
    assert_loads_without_sparc_loss(checkpoint_path(folder, "distill"), folder / "tiny.json")


def test_coca_trains_with_its_captioning_loss_beside(folder):
    write_model(folder / "coca", COCA_CONFIG)
    torch.manual_seed(0)
    plain = CoCa(**{key: value for key, value in COCA_CONFIG.items() if key != "custom_text"})
    # open_clip leaves this one to whatever the memory held.
    torch.nn.init.normal_(plain.text_decoder.text_projection, std=0.1)
    torch.save(plain.state_dict(), folder / "coca" / "open_clip_pytorch_model.bin")
    log = train(folder, "--model", f"local-dir:{folder / 'coca'}", "--accum-freq", "2", name="captions")
    assert_trained(log)
    assert logged_losses(log, "Caption_loss")
    (folder / "tiny_coca.json").write_text(json.dumps(COCA_CONFIG), encoding="utf-8")
    assert_loads_without_sparc_loss(checkpoint_path(folder, "captions"), folder / "tiny_coca.json")


def test_a_convolutional_tower_trains(folder):
    write_model(folder / "resnet", RESNET_CONFIG)
    assert_trained(train(folder, "--model", f"local-dir:{folder / 'resnet'}", name="resnet"))


def test_a_weight_of_zero_leaves_plain_clip_training_bit_for_bit(folder):
    train(folder, name="stock", epochs=2, launcher=STOCK)
    train(
        folder, "--sparc-global-weight", "1", "--sparc-fine-grained-weight", "0", name="without-fine-grained", epochs=2
    )
    assert_same_weights(
        checkpoint(folder, "stock", 2)["state_dict"], checkpoint(folder, "without-fine-grained", 2)["state_dict"]
    )


def test_loss_clip_is_stock_training_bit_for_bit(folder):
    train(folder, name="stock-once", launcher=STOCK)
    train(folder, "--loss", "clip", name="clip-once", launcher=LAUNCHER)
    assert_same_weights(checkpoint(folder, "stock-once")["state_dict"], checkpoint(folder, "clip-once")["state_dict"])


def test_resume_latest_goes_on_as_if_never_interrupted(folder):
    # A constant rate: open_clip's cosine would depend on --epochs.
    constant = ("--lr-scheduler", "const", "--seed", "1")
    train(folder, *constant, name="resumed", epochs=1)
    log = train(folder, *constant, "--resume", "latest", name="resumed", epochs=2)
    assert "resuming checkpoint" in log
    assert checkpoint(folder, "resumed", 2)["epoch"] == 2
    assert_trained(log)


def test_sparc_start_counts_the_epochs_before_a_resume(folder):
    """From the third epoch on: a loss that counted for itself would begin two epochs after the resume."""
    start = ("--sparc-start", "2", "--lr-scheduler", "const", "--log-every-n-steps", "1")
    train(folder, *start, name="parts", epochs=1)
    log = train(folder, *start, "--resume", "latest", name="parts", epochs=3)
    steps = logged_losses(log, "Fine_grained_loss")
    assert steps[:4] == [0] * 4  # the second epoch
    assert len(steps) == 8
    assert min(steps[4:]) > 0


def test_a_plain_clip_checkpoint_resumes_under_sparc(folder):
    train(folder, name="plain-first", epochs=1, launcher=STOCK)
    log = train(folder, "--resume", "latest", name="plain-first", epochs=2)
    assert "resuming checkpoint" in log
    assert_trained(log)


@pytest.mark.parametrize(
    ("flags", "options"), [((), {}), (("--siglip",), {"init_logit_bias": 0.0})], ids=["clip", "siglip"]
)
def test_the_checkpoint_loads_in_open_clip_without_sparc_loss(folder, flags, options):
    name = "-".join(("portable", *flags)).replace("--", "")
    train(folder, *flags, name=name)
    assert_loads_without_sparc_loss(checkpoint_path(folder, name), folder / "tiny.json", **options)


@pytest.mark.parametrize(
    "flags",
    [(), ("--siglip",), ("--accum-freq", "2"), ("--sparc-image-negatives", "3")],
    ids=lambda flags: " ".join(flags) or "clip",
)
def test_two_gloo_ranks_train_and_gather_with_gradient(folder, flags):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--", *SPARC)
    log = train(folder, *flags, name="two-ranks-" + "-".join(flags).replace("--", ""), launcher=torchrun)
    assert_trained(log)
    assert log.count("turning on --local-loss --gather-with-grad") == 1


def refusal(*arguments: str, launcher=SPARC, env=None) -> str:
    """The last line of a run that must fail with argparse's exit code."""
    finished = run_python(*launcher, *arguments, env=env)
    assert finished.returncode == 2, finished.stdout
    return finished.stdout.strip().splitlines()[-1]


def test_a_used_name_is_refused_and_the_run_kept(folder):
    train(folder, name="used")
    before = sorted((folder / "logs" / "used").rglob("*"))
    line = refusal(*data_flags(folder, name="used"))
    assert "argument --name: 'used' is a run already, in" in line
    assert "expected a new name, or --resume latest" in line
    assert sorted((folder / "logs" / "used").rglob("*")) == before


def test_a_missing_csv_is_refused_before_anything_is_written(folder):
    line = refusal(*data_flags(folder, name="nothing"), "--train-data", "not/there.csv")
    assert "argument --train-data: there is no file 'not/there.csv'; expected a CSV file" in line
    assert not (folder / "logs" / "nothing").exists()


@only_open_clip_3
@pytest.mark.parametrize("flag", ["torchscript", "trace"])
def test_torchscript_is_refused_with_the_reason(folder, flag):
    line = refusal(*data_flags(folder, name="scripted"), f"--{flag}")
    assert f"argument --{flag}: not with --loss sparc; a TorchScript model cannot return" in line
    assert not (folder / "logs" / "scripted").exists()


def test_an_unknown_loss_answers_with_the_known_and_the_nearest():
    line = refusal("--loss", "sprac", launcher=LAUNCHER)
    assert (
        "argument --loss: unknown loss 'sprac'; known: clip, filip, gloria, mgca, pacl, sparc; did you mean 'sparc'?"
        in line
    )


def test_an_abbreviated_loss_flag_does_not_silently_train_clip(folder):
    line = refusal(*data_flags(folder, name="abbreviated"), "--los", "sparc", launcher=LAUNCHER)
    assert "argument --loss-dist-impl: 'sparc' is a loss; expected --loss sparc" in line


def test_a_threshold_outside_0_to_1_is_refused():
    assert "argument --sparc-threshold: '1.5' given; expected a number between 0 and 1" in refusal(
        "--sparc-threshold", "1.5"
    )


def test_stock_open_clip_stops_at_a_flag_of_ours_instead_of_training_clip(folder):
    # Without our patch it reads `--loss` as `--loss-dist-impl`: the flag beside it is what makes that loud.
    flags = ("--loss", "sparc", "--sparc-fine-grained-weight", "1")
    line = refusal(*data_flags(folder, name="unpatched"), *flags, launcher=STOCK)
    assert "unrecognized arguments: --sparc-fine-grained-weight 1" in line
    assert not (folder / "logs" / "unpatched").exists()


def test_missing_training_extras_are_named_with_the_pip_command(tmp_path):
    (tmp_path / "braceexpand.py").write_text("raise ImportError('No module named braceexpand')", encoding="utf-8")
    line = refusal(env={"PYTHONPATH": str(tmp_path)})
    assert "open_clip's training cannot be imported (No module named braceexpand)" in line
    assert "pip install 'sparc-loss[train]'" in line


def test_an_untested_open_clip_is_refused_with_the_tested_versions(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import open_clip; open_clip.__version__ = '9.9.9'", encoding="utf-8")
    line = refusal(env={"PYTHONPATH": str(tmp_path)})
    assert "open_clip_torch 9.9.9 is installed; sparc_loss.train was tested with 3.0.0" in line


def test_help_shows_our_flags_in_a_group_and_open_clips_own():
    finished = run_python(*LAUNCHER, "--help")
    assert finished.returncode == 0
    assert "SPARC:" in finished.stdout
    assert "--sparc-fine-grained-weight" in finished.stdout
    assert "--train-data" in finished.stdout


@pytest.mark.parametrize(
    ("most_recent", "there", "refused"),
    [
        (True, {"epoch_2.pt": False}, None),  # not the one that is resumed: open_clip starts from the beginning
        (True, {"epoch_latest.pt": False, "epoch_2.pt": True}, "epoch_latest.pt"),
        (True, {"epoch_latest.pt": True, "epoch_2.pt": False}, None),
        (False, {"epoch_1.pt": True, "epoch_2.pt": False}, "epoch_2.pt"),
        (False, {"epoch_1.pt": False, "epoch_2.pt": True}, None),
        (False, {}, None),
    ],
)
def test_the_checkpoint_that_resume_latest_takes_is_the_one_that_is_checked(
    tmp_path, capsys, most_recent, there, refused
):
    (tmp_path / "checkpoints").mkdir()
    for name, is_whole in there.items():
        path = tmp_path / "checkpoints" / name
        torch.save({"state_dict": {"weight": torch.zeros(1000)}}, path)
        if not is_whole:
            path.write_bytes(path.read_bytes()[:1000])
    args = Namespace(resume="latest", remote_sync=None, save_most_recent=most_recent)
    if refused is None:
        launcher._check_checkpoint(ArgumentParser(), args, tmp_path)
        return
    with pytest.raises(SystemExit):
        launcher._check_checkpoint(ArgumentParser(), args, tmp_path)
    assert f"{refused} is truncated or corrupt" in capsys.readouterr().err
