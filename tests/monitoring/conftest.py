"""What the plug-in is given after an epoch of open_clip's training."""

from argparse import Namespace

import open_clip
import pytest
import torch
from launching import MODEL_CONFIG

from sparc_loss import surface_embeddings


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = open_clip.CLIP(**MODEL_CONFIG)
    model.visual.preprocess_cfg = {"size": (32, 32)}
    return surface_embeddings(model, open_clip.get_tokenizer("ViT-B-32", context_length=16))


@pytest.fixture
def args(folder, tmp_path):
    (tmp_path / "run").mkdir()
    return Namespace(
        sparc_show_every=0,
        sparc_probe_every=0,
        sparc_fine_grained_scale=None,
        precision="fp32",
        sparc_threshold=None,
        sparc_alignment="sparse",
        model="ViT-B-32",
        cache_dir=None,
        force_context_length=16,
        val_data=str(folder / "val.csv"),
        val_num_samples=None,
        dataset_type="auto",
        csv_img_key="filepath",
        csv_caption_key="title",
        csv_separator="\t",
        batch_size=8,
        workers=2,
        distributed=False,
        rank=0,
        logs=str(tmp_path),
        name="run",
        save_logs=True,
        wandb=False,
        accum_freq=2,
    )
