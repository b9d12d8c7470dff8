"""Validation pairs: one caption for each image, one image in memory, no file left open."""

import csv
import io
import random
import tarfile

import numpy as np
import pytest
import torch
from launching import run_python
from PIL import Image

from sparc_loss.monitoring.validation_pairs import random_state_kept, validation_pairs

MANY = """
import resource, sys
from argparse import Namespace
from sparc_loss.monitoring.validation_pairs import validation_pairs

resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
args = Namespace(
    val_data=sys.argv[1], dataset_type="auto", csv_img_key="filepath", csv_caption_key="title", csv_separator="\t",
    distributed=False, val_num_samples=None,
)
print(len(list(validation_pairs(args, 200))))
"""


def write_pairs(folder, images: int, captions: int) -> str:
    """A CSV with `captions` rows in a row for each of `images` images."""
    with open(folder / "val.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["filepath", "title"])
        for image in range(images):
            path = folder / f"{image}.png"
            Image.new("RGB", (4, 4), (image % 256, image // 256, 0)).save(path)
            writer.writerows([path, f"caption {caption} of {image}"] for caption in range(captions))
    return str(folder / "val.csv")


def test_every_image_of_a_csv_comes_once_with_its_first_caption(args, tmp_path):
    args.val_data = write_pairs(tmp_path, images=6, captions=5)
    pairs = list(validation_pairs(args, 4))
    assert [caption for _, caption in pairs] == [f"caption 0 of {image}" for image in range(4)]
    assert [image.getpixel((0, 0))[0] for image, _ in pairs] == [0, 1, 2, 3]


def test_every_image_of_a_webdataset_comes_once_with_its_first_caption(args, tmp_path):
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        for sample in range(6):
            picture = io.BytesIO()
            Image.new("RGB", (4, 4), (sample // 2, 0, 0)).save(picture, format="PNG")
            for suffix, content in (("png", picture.getvalue()), ("txt", f"caption {sample}".encode())):
                entry = tarfile.TarInfo(f"{sample:03d}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    args.val_data = str(tmp_path / "val.tar")
    assert [caption for _, caption in validation_pairs(args, 4)] == ["caption 0", "caption 2", "caption 4"]


@pytest.mark.slow
def test_many_images_need_few_open_files(tmp_path):
    finished = run_python("-c", MANY, write_pairs(tmp_path, images=200, captions=1))
    assert finished.returncode == 0, finished.stdout
    assert finished.stdout.strip().endswith("200")


def test_an_image_is_read_when_it_is_asked_for_and_named_if_it_cannot_be(args, tmp_path):
    args.val_data = write_pairs(tmp_path, images=3, captions=1)
    (tmp_path / "2.png").write_text("no image", encoding="utf-8")
    pairs = validation_pairs(args, 3)
    assert [next(pairs)[1] for _ in range(2)] == ["caption 0 of 0", "caption 0 of 1"]
    with pytest.raises(ValueError, match=r"--val-data: .*2\.png cannot be read \(cannot identify .*; expected an im"):
        next(pairs)


def test_the_random_states_are_restored_also_after_an_error():
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    def draw_and_fail():
        random.random(), np.random.rand(), torch.rand(1)
        raise RuntimeError("inside")

    before = states()
    with pytest.raises(RuntimeError, match="inside"), random_state_kept():
        draw_and_fail()
    assert states() == before
