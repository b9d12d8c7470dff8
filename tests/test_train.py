"""`python -m sparc_loss.train`, as real processes on the CPU."""

import functools
import http.server
import logging
import shutil
import threading
from argparse import ArgumentParser, Namespace

import open_clip
import pytest
import torch
from launching import (
    MODEL_CONFIG,
    RESNET_CONFIG,
    SPARC,
    STOCK,
    TORCHRUN,
    assert_same_weights,
    assert_trained,
    checkpoint,
    checkpoint_path,
    data_flags,
    logged_losses,
    run_python,
    train,
    write_coca,
    write_model,
)
from loading import assert_loads_without_sparc_loss
from major_version import only_open_clip_3
from open_clip import CLIP
from open_clip_train import main as open_clip_main
from open_clip_train import params

from sparc_loss import train as launcher

LAUNCHER = ("-m", "sparc_loss.train")


@pytest.fixture(scope="module")
def address(folder):
    """Where a server gives the folder's files."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = lambda *given: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sparc", pytest.param("clip", marks=pytest.mark.exhaustive)])
def test_addresses_that_stock_open_clip_trains_on_are_taken(folder, address, loss):
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
    "a CSV that is not there": (
        ("--loss", "sparc", "--train-data", "not/there.csv"),
        "argument --train-data: there is no file 'not/there.csv'; expected a CSV file",
    ),
    "a column that is not there": (
        ("--loss", "sparc", "--csv-caption-key", "caption"),
        "has no column 'caption'; expected one of 'filepath', 'title' (columns are separated by '\\t'",
    ),
    "an unknown loss": (
        ("--loss", "sprac"),
        "argument --loss: unknown loss 'sprac'; known: clip, filip, flair, gloria, mgca, pacl, sparc; "
        "did you mean 'sparc'?",
    ),
    "an abbreviated flag, which open_clip takes for --loss-dist-impl": (
        ("--los", "sparc"),
        "argument --loss-dist-impl: 'sparc' is a loss; expected --loss sparc",
    ),
    "a threshold outside [0, 1]": (
        ("--loss", "sparc", "--sparc-threshold", "1.5"),
        "argument --sparc-threshold: '1.5' given; expected a number between 0 and 1",
    ),
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
    "boxes with a teacher": (
        ("--loss", "sparc", "--sparc-regions", "boxes", "--distill-model", "RN50", "--distill-pretrained", "openai"),
        "--distill-model is set; expected it off with --sparc-regions: the teacher takes the texts",
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


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", "has no pair; expected at least one"),
        ("0.png\ta dog\nnone.png\ta cat\n", "line 3: there is no file 'none.png'; expected an image"),
    ],
    ids=["empty", "missing image"],
)
def test_validation_that_would_end_the_first_epoch_is_refused(folder, tmp_path, capsys, monkeypatch, rows, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "0.png").touch()
    (tmp_path / "val.csv").write_text(f"filepath\ttitle\n{rows}", encoding="utf-8")
    flags = ("--loss", "sparc", "--val-data", "val.csv")
    assert message in refused(capsys, folder, "refused", *flags)
    # Not if it is never measured: what follows is refused.
    flags = (*flags, "--val-frequency", "0", "--resume", "none.pt")
    assert "argument --resume: there is no file 'none.pt'" in refused(capsys, folder, "refused", *flags)


@only_open_clip_3
@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--sparc-diagnostics", "--sparc-diagnostics is set; expected it off with open_clip 3"),
        ("--torchscript", "argument --torchscript: not with --loss sparc; a TorchScript model cannot return"),
        ("--trace", "argument --trace: not with --loss sparc; a TorchScript model cannot return"),
    ],
)
def test_what_open_clip_3_alone_has_is_refused_before_anything_is_written(folder, capsys, flag, message):
    assert message in refused(capsys, folder, "refused", "--loss", "sparc", flag)


def test_pairs_are_shared_among_the_processes(folder, capsys, monkeypatch):
    for name, value in (("WORLD_SIZE", "8"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    line = refused(capsys, folder, "shared", "--loss", "clip")
    assert "has 32 pairs for 8 processes; expected at least --batch-size 8 x --accum-freq 1 for each" in line


def test_a_refused_command_leaves_the_loggers_and_open_clip_as_they_were(folder, capsys):
    before = logging.getLogger().handlers[:], open_clip_main.parse_args, open_clip_main.train_one_epoch
    refused(capsys, folder, "untouched", "--loss", "sparc", "--sparc-image-negatives", "8")
    assert (logging.getLogger().handlers, open_clip_main.parse_args, open_clip_main.train_one_epoch) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "--precision amp_bf16 --accum-freq 2 --siglip",
        "--accum-freq 2 --sparc-alignment softmax --sparc-reduction sample --sparc-tokens all --sparc-threshold 0.5 "
        "--sparc-fine-grained-scale 10 --sparc-image-negatives 1",
        "--lock-image --lock-image-unlocked-groups 1 --force-custom-text --grad-checkpointing "
        "--force-patch-dropout 0.5 --force-image-size 24 --force-context-length 12",
        pytest.param(
            "--lock-image --lock-text --lock-text-freeze-layer-norm",
            marks=pytest.mark.skipif(
                not hasattr(CLIP, "lock_text_tower"), reason="this open_clip locks the text tower of no CLIP"
            ),
        ),
        pytest.param("--torchcompile", marks=pytest.mark.exhaustive),
    ],
)
def test_trains(folder, flags):
    log = train(folder, *flags.split(), name=flags.replace(" ", "").replace("--", "-").strip("-"))
    assert_trained(log, *(["Image_contrastive_loss"] if "image-negatives" in flags else []))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "options"),
    [((), {}), pytest.param(("--siglip",), {"init_logit_bias": 0.0}, marks=pytest.mark.exhaustive)],
    ids=["clip", "siglip"],
)
def test_a_run_is_evaluated_and_its_checkpoint_loads_in_open_clip_without_sparc_loss(folder, flags, options):
    name = "-".join(("portable", *flags)).replace("--", "")
    log = train(folder, *flags, "--val-data", str(folder / "val.csv"), name=name)
    assert "image_to_text_R@1" in log
    assert_loads_without_sparc_loss(checkpoint_path(folder, name), folder / "tiny.json", **options)


FEW_CLASSES = """
import sys
from open_clip_train import zero_shot
from sparc_loss.train import main

zero_shot.IMAGENET_CLASSNAMES = zero_shot.IMAGENET_CLASSNAMES[:6]
zero_shot.OPENAI_IMAGENET_TEMPLATES = zero_shot.OPENAI_IMAGENET_TEMPLATES[:2]
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
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


@pytest.mark.slow
def test_distills_from_a_teacher(folder):
    teacher = ("--distill-model", f"local-dir:{folder / 'model'}", "--distill-pretrained", "ignored")
    log = train(folder, *teacher, name="distill")
    assert_trained(log, "Distill_loss")
    assert_loads_without_sparc_loss(checkpoint_path(folder, "distill"), folder / "tiny.json")


@pytest.mark.slow
def test_coca_trains_with_its_captioning_loss_beside(folder):
    write_coca(folder)
    log = train(folder, "--model", f"local-dir:{folder / 'coca'}", "--accum-freq", "2", name="captions")
    assert_trained(log, "Caption_loss")
    assert_loads_without_sparc_loss(checkpoint_path(folder, "captions"), folder / "tiny_coca.json")


@pytest.mark.slow
def test_a_convolutional_tower_trains(folder):
    write_model(folder / "resnet", RESNET_CONFIG)
    assert_trained(train(folder, "--model", f"local-dir:{folder / 'resnet'}", name="resnet"))


@pytest.fixture(scope="module")
def stock(folder):
    """The run "stock": two epochs of stock open_clip."""
    train(folder, name="stock", epochs=2, launcher=STOCK)
    return "stock"


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    ["--loss clip", "--loss sparc --sparc-global-weight 1 --sparc-fine-grained-weight 0"],
    ids=["clip", "a weight of zero"],
)
def test_without_a_fine_grained_loss_training_is_that_of_stock_open_clip_bit_for_bit(folder, stock, flags):
    name = flags.replace(" ", "").replace("--", "-").strip("-")
    train(folder, *flags.split(), name=name, epochs=2, launcher=LAUNCHER)
    assert_same_weights(folder, stock, name, epoch=2)


@pytest.mark.slow
def test_a_plain_clip_checkpoint_resumes_under_sparc(folder, stock):
    shutil.copytree(folder / "logs" / stock, folder / "logs" / "resumed")
    log = train(folder, "--resume", "latest", name="resumed", epochs=3)
    assert "resuming checkpoint" in log
    assert_trained(log)


@pytest.mark.slow
def test_resume_latest_goes_on_and_sparc_start_counts_the_epochs_before(folder):
    """From the third epoch on: a loss that counted for itself would begin two epochs after the resume."""
    # A constant rate: open_clip's cosine would depend on --epochs.
    start = ("--sparc-start", "2", "--lr-scheduler", "const", "--log-every-n-steps", "1")
    train(folder, *start, name="parts", epochs=1)
    log = train(folder, *start, "--resume", "latest", name="parts", epochs=3)
    assert "resuming checkpoint" in log
    assert checkpoint(folder, "parts", 3)["epoch"] == 3
    steps = logged_losses(log, "Fine_grained_loss")
    assert steps[:4] == [0] * 4  # the second epoch
    assert len(steps) == 8
    assert min(steps[4:]) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "--accum-freq 2 --sparc-image-negatives 3",
        *(pytest.param(x, marks=pytest.mark.exhaustive) for x in ("", "--siglip")),
    ],
)
def test_two_gloo_ranks_train_and_gather_with_gradient(folder, flags):
    launcher = (*TORCHRUN, *SPARC)
    log = train(folder, *flags.split(), name="two-ranks" + flags.replace(" ", ""), launcher=launcher)
    assert_trained(log)
    assert log.count("turning on --local-loss --gather-with-grad") == 1


def test_a_used_name_is_refused_and_the_run_kept(folder, capsys):
    log = folder / "logs" / "used" / "out.log"
    log.parent.mkdir(parents=True)
    log.touch()
    with pytest.raises(SystemExit):
        launcher.main([*data_flags(folder, name="used"), "--loss", "sparc"])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "argument --name: 'used' is a run already, in" in line
    assert "expected a new name, or --resume latest" in line
    assert list(log.parent.iterdir()) == [log]


@only_open_clip_3
def test_stock_open_clip_stops_at_a_flag_of_ours_instead_of_training_clip(capsys):
    # Without our patch it reads `--loss` as `--loss-dist-impl`: the flag beside it is what makes that loud.
    with pytest.raises(SystemExit):
        params.parse_args(["--model", "ViT-B-32", "--loss", "sparc", "--sparc-fine-grained-weight", "1"])
    assert "unrecognized arguments: --sparc-fine-grained-weight 1" in capsys.readouterr().err


@pytest.mark.slow
def test_missing_training_extras_are_named_with_the_pip_command(tmp_path):
    (tmp_path / "braceexpand.py").write_text("raise ImportError('No module named braceexpand')", encoding="utf-8")
    finished = run_python(*SPARC, env={"PYTHONPATH": str(tmp_path)})
    assert finished.returncode == 2
    assert "open_clip's training cannot be imported (No module named braceexpand)" in finished.stdout
    assert "pip install 'sparc-loss[train]'" in finished.stdout


def test_an_untested_open_clip_is_refused_and_a_patch_release_warned_of(monkeypatch, folder, capsys):
    monkeypatch.setattr(open_clip, "__version__", "9.9.9")
    line = refused(capsys, folder, "refused", "--loss", "sparc")
    assert "open_clip_torch 9.9.9 is installed; sparc_loss.train was tested with 3.0.0" in line
    monkeypatch.setattr(open_clip, "__version__", "3.3.7")
    with pytest.raises(SystemExit):
        launcher.main(["--loss", "sparc", "--sparc-threshold", "2"])
    warned = capsys.readouterr().err
    assert "warning: open_clip_torch 3.3.7 is installed; sparc_loss.train was tested with 3.3.0" in warned


def test_help_shows_our_flags_in_a_group_and_open_clips_own(capsys):
    with pytest.raises(SystemExit) as ended:
        launcher.main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("SPARC:", "--sparc-fine-grained-weight", "--train-data"))


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
    args = Namespace(
        resume="latest", remote_sync=None, save_most_recent=most_recent, train_data="x.csv", dataset_type="csv"
    )
    checkpoint = launcher._checkpoint_to_resume(ArgumentParser(), args, tmp_path)
    if refused is None:
        if checkpoint is not None:
            launcher._check_checkpoint(ArgumentParser(), args, checkpoint, plugin=None, world_size=1)
        return
    with pytest.raises(SystemExit):
        launcher._check_checkpoint(ArgumentParser(), args, checkpoint, plugin=None, world_size=1)
    assert f"{refused} is truncated or corrupt" in capsys.readouterr().err


def test_checkpoints_that_open_clip_would_not_find_are_not_written_over(tmp_path, capsys):
    """It looks for them by a pattern, in which the name of the run is not quoted."""
    run = tmp_path / "run[1]"
    (run / "checkpoints").mkdir(parents=True)
    torch.save({"epoch": 1}, run / "checkpoints" / "epoch_1.pt")
    args = Namespace(resume="latest", remote_sync=None, save_most_recent=False)
    with pytest.raises(SystemExit):
        launcher._checkpoint_to_resume(ArgumentParser(), args, run)
    assert "run[1]/checkpoints', because of the characters [, * or ?" in capsys.readouterr().err


def test_a_file_that_holds_no_checkpoint_is_refused(folder, tmp_path, capsys):
    torch.save([1], tmp_path / "list.pt")
    line = refused(capsys, folder, "refused", "--resume", str(tmp_path / "list.pt"))
    assert line.endswith(f"argument --resume: {tmp_path / 'list.pt'} holds a list; expected a checkpoint")
