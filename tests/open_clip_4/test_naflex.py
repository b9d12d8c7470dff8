"""Images and captions of any size: NaFlex patches with a mask for padding, and captions without a fixed length."""

import csv
import json
import math
from argparse import ArgumentParser, Namespace

import numpy as np
import pytest
import tiny_tokenizers
import torch
from launching import (
    MODEL_CONFIG,
    SPARC,
    TORCHRUN,
    checkpoint_path,
    data_flags,
    logged_losses,
    run_python,
    train,
    write_model,
)
from loading import assert_loads_without_sparc_loss
from major_version import only_open_clip_4
from open_clip import CustomTextCLIP
from PIL import Image
from tiny_models import CONTEXT, EMBED_DIM, END, TRANSFORMER, ToyTokenizer, captions
from torch import Tensor, nn
from torch.testing import assert_close

from sparc_loss import SparcLoss, surface_embeddings
from sparc_loss.embeddings.text import forward_with_tokens
from sparc_loss.embeddings.vision import forward_with_patches
from sparc_loss.plugins.sparc import SPARC as PLUGIN

pytestmark = only_open_clip_4
PATCH, CHANNELS = 8, 3
VIT = {"use_naflex": True, "patch_size": PATCH, "embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": 32}
# The ways in which a NaFlexVit pools.
VISION = {
    "class token": {"timm_pool": "token", "timm_model_kwargs": {**VIT, "class_token": True}},
    "average": {
        "timm_pool": "avg",
        "timm_model_kwargs": {**VIT, "global_pool": "avg", "class_token": False, "fc_norm": True},
    },
    "attention pool": {"timm_pool": "map", "timm_model_kwargs": {**VIT, "global_pool": "map", "class_token": False}},
    "attention pool, no projection": {"timm_pool": "map", "timm_proj": "none", "timm_model_kwargs": VIT},
}
MODERN_TEXT = {**TRANSFORMER, "text_arch": "modern", "reg_tokens": 2, "pad_id": 0, "eos_id": END}


def naflex_clip(vision: str = "class token", text: dict | None = None) -> CustomTextCLIP:
    torch.manual_seed(1)
    config = {"timm_model_name": "vit_base_patch16_clip_224", "timm_proj": "linear", "image_size": 32}
    dim = 32 if "no projection" in vision else EMBED_DIM
    model = CustomTextCLIP(dim, {**config, **VISION[vision]}, text or TRANSFORMER, output_dict=True)
    for parameter in model.parameters():
        if parameter.dim() > 0 and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return surface_embeddings(model, ToyTokenizer()).eval()


def patches_of(*grids: tuple[int, int], length: int | None = None) -> dict[str, Tensor]:
    """A batch of random images of these grids (height, width), as the collator of open_clip_train makes it."""
    length = length or max(height * width for height, width in grids)
    batch = {
        "patches": torch.zeros(len(grids), length, PATCH * PATCH * CHANNELS),
        "patch_coord": torch.zeros(len(grids), length, 2, dtype=torch.long),
        "patch_valid": torch.zeros(len(grids), length, dtype=torch.bool),
    }
    for row, (height, width) in enumerate(grids):
        number = height * width
        generator = torch.Generator().manual_seed(100 * height + width)
        batch["patches"][row, :number] = torch.randn(number, PATCH * PATCH * CHANNELS, generator=generator)
        batch["patch_coord"][row, :number] = torch.tensor([[y, x] for y in range(height) for x in range(width)])
        batch["patch_valid"][row, :number] = True
    return batch


@pytest.fixture(params=VISION)
def model(request: pytest.FixtureRequest) -> CustomTextCLIP:
    return naflex_clip(request.param)


# Patches


def test_the_pooled_feature_is_the_towers_own_bit_for_bit(model: CustomTextCLIP) -> None:
    images = patches_of((2, 3), (4, 1))
    assert torch.equal(forward_with_patches(model.visual, images)[0], model.visual(images))


def test_training_returns_the_mask_of_the_patches_that_are_no_padding(model: CustomTextCLIP) -> None:
    images = patches_of((2, 3), (4, 1), length=9)
    output = model.train()(images, captions())
    assert torch.equal(output["patch_mask"], images["patch_valid"])
    assert output["patch_features"].shape == (2, 9, output["image_features"].shape[-1])
    assert output["patch_mask"].sum(dim=1).tolist() == [6, 4]


def test_a_patch_embedding_is_the_pooled_feature_of_that_patch_alone(model: CustomTextCLIP) -> None:
    images, trunk = patches_of((2, 3), (4, 1)), model.visual.trunk
    patches, grid = model.encode_patches(images)
    assert grid is None
    states = trunk.forward_features(**images)["patches"]
    prefix = trunk.num_prefix_tokens
    alone = [
        # Whatever the pool reads, it finds this patch.
        model.visual.head(trunk.forward_head(patch[:, None].expand(-1, 1 + prefix, -1)))
        for patch in states[:, prefix:].unbind(dim=1)
    ]
    assert_close(patches, torch.stack(alone, dim=1))


def test_padding_has_no_influence_on_patches_and_loss(model: CustomTextCLIP) -> None:
    tight, padded = patches_of((2, 3), (3, 2)), patches_of((2, 3), (3, 2), length=11)
    padded["patches"][:, 6:] = 7.0
    outputs = [model.train()(images, captions()) for images in (tight, padded)]
    assert_close(outputs[1]["patch_features"][:, :6], outputs[0]["patch_features"])
    losses = [SparcLoss()(**output) for output in outputs]
    assert_close(losses[1], losses[0])


def test_whole_images_still_give_their_grid(model: CustomTextCLIP) -> None:
    images = torch.randn(2, 3, 32, 32)
    patches, grid = model.encode_patches(images)
    assert grid == (4, 4)
    in_rows = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    as_patches = {**patches_of((4, 4), (4, 4)), "patches": in_rows}
    assert_close(model.encode_patches(as_patches)[0], patches)


# Captions


@pytest.mark.parametrize("pool", ["eos", "mean", "map"])
def test_modern_text_gives_the_pooled_feature_bit_for_bit_and_each_token_alone(pool: str) -> None:
    model = naflex_clip(text={**MODERN_TEXT, "pool_type": pool})
    text, texts = model.text, captions(3)
    pooled, tokens = forward_with_tokens(model, texts)
    assert torch.equal(pooled, text(texts))
    assert tokens.shape == (3, CONTEXT, EMBED_DIM)
    states, _, _ = text._encode_tokens(texts)
    states = text.ln_final(states)[:, text.num_reg :]
    one = torch.ones(3, 1, dtype=torch.bool)
    for index in range(CONTEXT):
        alone = text.pool(states[:, index : index + 1], text=torch.full((3, 1), END), valid=one, eos_id=END)
        project = text.text_projection
        assert_close(tokens[:, index], alone @ project if isinstance(project, Tensor) else project(alone))


# What is refused


@pytest.mark.parametrize(
    ("args", "varying"),
    [
        ({"use_naflex": True, "naflex_seq_lens": [16, 25]}, "--use-naflex and several --naflex-seq-lens"),
        ({"use_naflex": True, "naflex_seq_lens": None}, "--use-naflex and several --naflex-seq-lens"),
        ({"variable_text": True}, "captions of variable length"),
    ],
)
def test_accumulating_batches_of_varying_sizes_is_refused(args: dict, varying: str) -> None:
    parser = ArgumentParser()
    PLUGIN.add_arguments(parser)
    args = parser.parse_args([], Namespace(accum_freq=2, batch_size=8, **args))
    with pytest.raises(ValueError, match=f"--accum-freq is 2 with {varying}; expected 1 with --loss sparc"):
        PLUGIN.prepare_model(naflex_clip(), args)


# As real processes


@pytest.fixture(scope="module")
def folder(folder):
    """The tiny data set, of images whose sides differ, so that batches have padding."""
    generator = np.random.default_rng(1)
    with open(folder / "train.csv", encoding="utf-8", newline="") as file:
        paths = [row["filepath"] for row in csv.DictReader(file, delimiter="\t")]
    for index, path in enumerate(paths):
        shape = [(24, 56, 3), (56, 24, 3), (32, 32, 3)][index % 3]
        Image.fromarray(generator.integers(0, 255, shape, dtype=np.uint8)).save(path)
    return folder


NAFLEX = (
    "--log-every-n-steps",
    "1",
    "--use-naflex",
    "--naflex-patch-sizes",
    "8",
    "--naflex-num-train-image-tokens",
    "640",
)
VARYING = (*NAFLEX, "--naflex-seq-lens", "16", "26", "--naflex-max-tokens-per-batch", "208")


def assert_trained(log: str) -> None:
    losses = logged_losses(log, "Fine_grained_loss")
    assert losses, log
    assert all(math.isfinite(loss) and loss >= 0 for loss in losses)
    assert any(loss > 0 for loss in losses)  # not all: a batch of one pair is left over, which has no other


@pytest.mark.parametrize(
    ("loss", "launcher", "flags"),
    [
        ("sparc", (), VARYING),
        ("sparc", TORCHRUN, (*VARYING, "--precision", "amp_bf16", "--grad-checkpointing")),
        ("sparc", TORCHRUN, (*VARYING, "--fsdp")),
        ("sparc", (), (*NAFLEX, "--naflex-seq-lens", "26", "--accum-freq", "2", "--siglip")),
        *((loss, (), VARYING) for loss in ("pacl", "gloria", "mgca")),
        ("filip", TORCHRUN, VARYING),
    ],
    ids=["sparc", "DDP, amp_bf16", "FSDP2", "one length, accumulating", "pacl", "gloria", "mgca", "filip, DDP"],
)
def test_trains_on_images_of_any_size(folder, loss, launcher, flags, request):
    name = request.node.callspec.id.replace(", ", "-")
    assert_trained(train(folder, *flags, name=name, launcher=(*launcher, "-m", "sparc_loss.train", "--loss", loss)))


# open_clip 3 builds only the NaFlex towers that timm has a name for: so here is one that is small.
TINY_TOWER = """
from timm.models import register_model
from timm.models.naflexvit import NaFlexVitCfg, _create_naflexvit

@register_model
def naflexvit_tiny(pretrained=False, **kwargs):
    cfg = NaFlexVitCfg(patch_size=8, embed_dim=32, depth=1, num_heads=2, global_pool="map", class_token=False)
    return _create_naflexvit("naflexvit_base_patch16_map", pretrained=False, cfg=cfg, **kwargs)
"""
TINY_CONFIG = {
    **MODEL_CONFIG,
    "vision_cfg": {"timm_model_name": "naflexvit_tiny", "timm_pool": "map", "timm_proj": "none", "image_size": 32},
}


def test_a_checkpoint_of_a_naflex_tower_loads_without_sparc_loss(folder, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(TINY_TOWER, encoding="utf-8")
    write_model(tmp_path / "naflex", TINY_CONFIG)
    (tmp_path / "tiny_naflex.json").write_text(json.dumps(TINY_CONFIG), encoding="utf-8")
    env = {"PYTHONPATH": str(tmp_path)}
    train(folder, *VARYING, "--model", f"local-dir:{tmp_path / 'naflex'}", name="named", launcher=SPARC, env=env)
    assert_loads_without_sparc_loss(checkpoint_path(folder, "named"), tmp_path / "tiny_naflex.json", env=env)


def test_a_checkpoint_of_a_converted_tower_loads_in_this_open_clip_converting_it_again(folder):
    train(folder, *VARYING, name="converted", launcher=SPARC)
    conversion = {"force_naflex_vision": True}
    path = checkpoint_path(folder, "converted")
    assert_loads_without_sparc_loss(path, folder / "tiny.json", versions=("this",), **conversion)


@pytest.mark.parametrize("images", [(), VARYING], ids=["of one size", "of any size"])
def test_trains_on_captions_of_variable_length(folder, tmp_path, images):
    text = {**MODEL_CONFIG["text_cfg"], "text_arch": "modern", "variable_text": True, "pool_type": "mean", "pad_id": 0}
    config = {**MODEL_CONFIG, "text_cfg": {**text, "hf_tokenizer_name": "the folder's own"}}
    write_model(tmp_path / "model", {**config, "custom_text": True})
    tiny_tokenizers.bert(tmp_path / "model")
    flags = ("--model", f"local-dir:{tmp_path / 'model'}", *images)
    assert_trained(train(folder, *flags, name=f"captions-{len(images)}"))


def test_accumulating_over_several_lengths_is_refused_before_training(folder):
    finished = run_python(*SPARC, *data_flags(folder, name="refused"), *VARYING, "--accum-freq", "2")
    assert finished.returncode != 0
    assert "error: --accum-freq is 2 with --use-naflex and several --naflex-seq-lens" in finished.stdout
