"""Training runs that are killed, and data, checkpoints and disks that are broken: real processes."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launching import SPARC, checkpoint, data_flags, logged_losses, run_python, train

pytestmark = pytest.mark.slow

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
EVERY_STEP = ("--log-every-n-steps", "1", "--lr-scheduler", "const")


@pytest.fixture(scope="module")
def folder(folder: Path) -> Path:
    """The tiny data, and four times as many pairs in long.csv."""
    lines = (folder / "train.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "long.csv").write_text("".join([lines[0], *lines[1:] * 4]), encoding="utf-8")
    return folder


def refusal(folder: Path, name: str, *flags: str) -> str:
    finished = run_python(*SPARC, *data_flags(folder, name=name), *flags)
    assert finished.returncode == 2, finished.stdout
    return finished.stdout.strip().splitlines()[-1]


def checkpoints(folder: Path, name: str) -> list[str]:
    return sorted(path.name for path in (folder / "logs" / name / "checkpoints").iterdir())


def test_a_killed_run_resumes_from_its_last_checkpoint_and_the_loss_goes_on(folder: Path) -> None:
    flags = [*data_flags(folder, name="killed", epochs=3), "--train-data", str(folder / "long.csv"), *EVERY_STEP]
    log = []
    with subprocess.Popen(
        [sys.executable, *SPARC, *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT
    ) as run:
        for line in run.stdout:
            log.append(line)
            if re.search(r"Train Epoch: 1 \[ *8\d/", line):
                run.send_signal(signal.SIGKILL)
                break
        run.stdout.read()
    assert run.returncode == -signal.SIGKILL
    assert checkpoints(folder, "killed") == ["epoch_1.pt"]

    resumed = train(
        folder, "--train-data", str(folder / "long.csv"), *EVERY_STEP, "--resume", "latest", name="killed", epochs=3
    )
    assert "resuming checkpoint" in resumed
    assert checkpoint(folder, "killed", 3)["epoch"] == 3
    before, after = (logged_losses(text, "Fine_grained_loss") for text in ("".join(log), resumed))
    assert len(after) == 2 * 16
    assert sum(after[:16]) < sum(before[:16])


def test_a_checkpoint_cut_short_is_refused_and_the_one_before_can_be_resumed(folder: Path) -> None:
    train(folder, name="cut", epochs=2)
    shutil.copytree(folder / "logs" / "cut", folder / "logs" / "whole")
    newest = folder / "logs" / "cut" / "checkpoints" / "epoch_2.pt"
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    line = refusal(folder, "cut", "--resume", "latest")
    assert f"argument --resume: {newest} is truncated or corrupt" in line
    assert "remove it to go on from the one before" in line
    newest.unlink()
    assert "resuming checkpoint" in train(folder, "--resume", "latest", name="cut", epochs=2)


def test_a_full_disk_ends_the_run_and_the_half_checkpoint_is_not_taken_for_one(folder: Path) -> None:
    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, 4_000_000))

    finished = subprocess.run(
        [sys.executable, *SPARC, *data_flags(folder, name="full")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=small_disk,
        env=ENVIRONMENT,
    )
    assert finished.returncode not in (0, 2), finished.stdout
    assert "torch.save(" in finished.stdout  # where open_clip was when it failed
    assert "is truncated or corrupt" in refusal(folder, "full", "--resume", "latest")


def test_a_missing_image_ends_the_run_with_its_name(folder: Path) -> None:
    (folder / "missing.csv").write_text("filepath\ttitle\nnot/there.png\ta red dog\n" * 8, encoding="utf-8")
    flags = ("--train-data", str(folder / "missing.csv"), "--csv-separator", "\t")
    finished = run_python(*SPARC, *data_flags(folder, name="missing"), *flags)
    assert finished.returncode == 1
    assert "FileNotFoundError: [Errno 2] No such file or directory" in finished.stdout


def test_empty_captions_are_warned_of_and_train(folder: Path) -> None:
    lines = (folder / "train.csv").read_text(encoding="utf-8").splitlines()
    empty = [line.split("\t")[0] + "\t" if index in (1, 2) else line for index, line in enumerate(lines)]
    (folder / "empty.csv").write_text("\n".join(empty) + "\n", encoding="utf-8")
    log = train(folder, "--train-data", str(folder / "empty.csv"), name="empty")
    assert "warning: 2 of 32 captions in" in log
    assert "are read as the word 'nan': pandas takes '' for missing values; the first is in line 2" in log
    assert all(torch.isfinite(torch.tensor(logged_losses(log, "Fine_grained_loss"))))
