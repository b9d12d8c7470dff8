"""A tiny data set and model, and training runs on them as real processes."""

import csv
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

COLOURS = ("red", "green", "blue", "yellow")
MODEL_CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
RESNET_CONFIG = {**MODEL_CONFIG, "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}}
COCA_CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {
        **MODEL_CONFIG["vision_cfg"],
        "attentional_pool": True,
        "attn_pooler_heads": 2,
        "attn_pooler_queries": 8,
        "output_tokens": True,
    },
    "text_cfg": {**MODEL_CONFIG["text_cfg"], "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    "custom_text": True,
}
SPARC = ("-m", "sparc_loss.train", "--loss", "sparc")
STOCK = ("-m", "open_clip_train.main")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--")
TIMEOUT = 300


def write_tiny_data(folder: Path) -> None:
    """32 training and 8 validation pairs as open_clip's CSV, and a local-dir model folder."""
    generator = np.random.default_rng(0)
    for split, size in (("train", 32), ("val", 8)):
        with open(folder / f"{split}.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t")
            writer.writerow(["filepath", "title"])
            for index in range(size):
                path = folder / f"{split}{index}.png"
                pixels = generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(path)
                writer.writerow([path, f"a {COLOURS[index % 4]} scene, number {index}!"])
    write_model(folder / "model", MODEL_CONFIG)
    # The same model under a name, for open_clip.create_model(name, pretrained=path).
    (folder / "tiny.json").write_text(json.dumps(MODEL_CONFIG), encoding="utf-8")


def write_model(folder: Path, config: dict) -> None:
    """A folder for `--model local-dir:`."""
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {}}), encoding="utf-8"
    )


def write_coca(folder: Path) -> None:
    """A folder "coca" for `--model local-dir:` in this one, with weights, and the same model under a name."""
    import open_clip  # takes seconds, and conftest.py imports this file

    write_model(folder / "coca", COCA_CONFIG)
    model = open_clip.CoCa(**{key: value for key, value in COCA_CONFIG.items() if key != "custom_text"})
    # open_clip leaves this one to whatever the memory held.
    torch.nn.init.normal_(model.text_decoder.text_projection, std=0.1)
    torch.save(model.state_dict(), folder / "coca" / "open_clip_pytorch_model.bin")
    (folder / "tiny_coca.json").write_text(json.dumps(COCA_CONFIG), encoding="utf-8")


def data_flags(folder: Path, *, name: str, epochs: int = 1) -> list[str]:
    """The flags of a run of 4 steps of 8 pairs an epoch on the CPU."""
    flags = {
        "model": f"local-dir:{folder / 'model'}",
        "train-data": folder / "train.csv",
        "batch-size": 8,
        "workers": 0,
        "warmup": 2,
        "lr": 1e-3,
        "device": "cpu",
        "logs": folder / "logs",
        "name": name,
        "epochs": epochs,
    }
    return [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]


def run_python(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """Run this interpreter with the arguments; output and errors are in `stdout`.

    It ends with its children on a time-out, and when the tests are killed (supervised.py).
    """
    command = [sys.executable, *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(env or {})}
    if "PYTHONPATH" in os.environ:  # stays behind the caller's
        env["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([env["PYTHONPATH"], os.environ["PYTHONPATH"]]))
    alive, ours = os.pipe()
    supervisor = [sys.executable, "-S", str(Path(__file__).with_name("supervised.py")), str(alive)]
    with subprocess.Popen(
        [*supervisor, *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
        start_new_session=True,
        pass_fds=[alive],
    ) as process:
        os.close(alive)
        try:
            output, _ = process.communicate(timeout=TIMEOUT)
        finally:
            os.close(ours)  # where the command still runs, the supervisor ends it
    return subprocess.CompletedProcess(command, process.returncode, output)


def train(folder: Path, *flags: str, name: str, epochs: int = 1, launcher=SPARC, env=None) -> str:
    """Run a training to its end; returns its log, fails with it where the run fails."""
    finished = run_python(*launcher, *data_flags(folder, name=name, epochs=epochs), *flags, env=env)
    assert finished.returncode == 0, finished.stdout
    return finished.stdout


def logged_losses(log: str, term: str) -> list[float]:
    """The values of a loss term, such as "Fine_grained_loss", in the order logged."""
    return [float(value) for value in re.findall(rf" {term}: ([\d.e+-]+|nan|inf) \(", log)]


def assert_trained(log: str, *terms: str) -> None:
    """Both terms of the loss, and those named here, were logged, finite and above zero."""
    for term in ("Contrastive_loss", "Fine_grained_loss", *terms):
        losses = logged_losses(log, term)
        assert losses, log
        assert all(math.isfinite(loss) and loss > 0 for loss in losses)


def checkpoint_path(folder: Path, name: str, epoch: int = 1) -> Path:
    """Where a run wrote its checkpoint after an epoch."""
    return folder / "logs" / name / "checkpoints" / f"epoch_{epoch}.pt"


def checkpoint(folder: Path, name: str, epoch: int = 1) -> dict:
    """The checkpoint that a run wrote after an epoch."""
    return torch.load(checkpoint_path(folder, name, epoch), map_location="cpu", weights_only=True)


def assert_same_weights(folder: Path, *names: str, epoch: int = 1) -> None:
    """These runs wrote the same weights after an epoch, bit for bit."""
    first, *others = (checkpoint(folder, name, epoch)["state_dict"] for name in names)
    for other in others:
        assert first.keys() == other.keys()
        assert [name for name in first if not torch.equal(first[name], other[name])] == []
