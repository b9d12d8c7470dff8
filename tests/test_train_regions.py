"""`--sparc-regions boxes` as real processes: CSV and WebDataset, accumulated, with workers, on two ranks."""

import csv
import io
import json
import tarfile

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
    run_python,
    train,
)
from loading import assert_loads_without_sparc_loss

pytestmark = pytest.mark.slow

REGIONS = ("--sparc-regions", "boxes")
BOX = [{"phrase": "a red scene", "box": [2, 2, 20, 20], "words": [1, 2]}]
# The flags of a run by the name of its data.
SHARDS = ("--train-num-samples", "32", "--workers", "1")


@pytest.fixture(scope="module")
def folder(folder):
    """The tiny data, a third of it with boxes, as boxes.csv and as two shards."""
    with open(folder / "train.csv", newline="", encoding="utf-8") as file:
        _, *rows = csv.reader(file, delimiter="\t")
    with open(folder / "boxes.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["filepath", "title", "boxes"])
        writer.writerows([*row, "" if index % 3 else json.dumps(BOX)] for index, row in enumerate(rows))
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as file:
            for index, (image, caption) in enumerate(rows[16 * shard : 16 * shard + 16]):
                with open(image, "rb") as content:
                    members = {"png": content.read(), "txt": caption.encode()}
                if index % 3 == 0:
                    members["json"] = json.dumps({"boxes": BOX}).encode()
                for kind, content in members.items():
                    info = tarfile.TarInfo(f"{index:03d}.{kind}")
                    info.size = len(content)
                    file.addfile(info, io.BytesIO(content))
    return folder


RUNS = {
    "csv": ("boxes.csv", SPARC, ("--val-data", "{folder}/val.csv")),
    "csv, workers, accumulating, bfloat16": (
        "boxes.csv",
        SPARC,
        ("--workers", "2", "--accum-freq", "2", "--precision", "amp_bf16", "--sparc-region-words", "only"),
    ),
    "csv, two ranks": ("boxes.csv", (*TORCHRUN, *SPARC), ("--sparc-region-share", "0.25")),
    "webdataset": ("{{0..1}}.tar", SPARC, SHARDS),
    "webdataset, two ranks, image negatives": (
        "{{0..1}}.tar",
        (*TORCHRUN, *SPARC),
        (*SHARDS, "--sparc-image-negatives", "2"),
    ),
}


# What each of these does is among the others.
EXHAUSTIVE = ("csv", "webdataset, two ranks, image negatives")


@pytest.mark.parametrize(
    "run", [pytest.param(run, marks=[pytest.mark.exhaustive] if run in EXHAUSTIVE else []) for run in RUNS]
)
def test_trains_and_its_checkpoint_loads_without_sparc_loss(folder, run):
    data, launcher, flags = RUNS[run]
    name = run.replace(", ", "-").replace(" ", "-")
    flags = [flag.format(folder=folder) for flag in (*flags, "--train-data", f"{{folder}}/{data}")]
    log = train(folder, *REGIONS, *flags, name=name, launcher=launcher)
    assert_trained(log)
    assert "left out of training" not in log
    assert "trained without boxes" not in log
    if "ranks" not in run:  # open_clip 3 then writes "module." before each name
        assert_loads_without_sparc_loss(checkpoint_path(folder, name), folder / "tiny.json")


def test_boxes_change_the_training_and_the_column_alone_does_not(folder):
    runs = {
        "without": ("--train-data", str(folder / "train.csv")),
        "column": ("--train-data", str(folder / "boxes.csv")),
        "regions": ("--train-data", str(folder / "boxes.csv"), *REGIONS),
    }
    for name, flags in runs.items():
        train(folder, *flags, name=f"same-{name}")
    assert_same_weights(folder, "same-without", "same-column")
    plain, regions = (checkpoint(folder, f"same-{name}")["state_dict"] for name in ("without", "regions"))
    assert plain.keys() == regions.keys()
    assert any(not torch.equal(plain[name], regions[name]) for name in plain)


def test_a_malformed_box_is_one_line_before_the_folder_of_the_run(folder):
    path = folder / "malformed.csv"
    path.write_text((folder / "boxes.csv").read_text(encoding="utf-8").replace("20, 20", "20, 200"), encoding="utf-8")
    flags = [*data_flags(folder, name="malformed"), "--train-data", str(path), *REGIONS]
    finished = run_python(*SPARC, *flags)
    assert finished.returncode == 2
    assert finished.stdout.splitlines()[-1].endswith(
        f"{path}, line 2: the box [2.0, 2.0, 20.0, 200.0] of 'a red scene' is outside its image, 32 x 32 pixels"
    )
    assert not (folder / "logs" / "malformed").exists()
