"""Patch embeddings: each is what the pooled feature would be of an image of that one patch."""

from types import SimpleNamespace

import pytest
import timm
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from open_clip import CLIP
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from open_clip.utils import to_2tuple
from tiny_models import EMBED_DIM, GRIDS, SHRUNKEN, TRANSFORMER, VISION, VIT, ToyTokenizer, clip, images_for
from torch import Tensor, nn
from torch.testing import assert_close

from sparc_loss import surface_embeddings
from sparc_loss.embeddings.vision import forward_with_patches, patch_extent, patch_size


@pytest.fixture(params=VISION)
def model(request: pytest.FixtureRequest) -> CLIP:
    return surface_embeddings(clip(request.param), ToyTokenizer()).eval()


def pooled_alone(visual: nn.Module, images: Tensor) -> Tensor:
    """The slow way: hand the tower's own pooling one patch at a time, in the place of all tokens."""
    if isinstance(visual, VisionTransformer):
        states = visual.transformer(visual._embeds(images))
        # Whatever the pool reads (class token, mean of patches, all by attention), it finds this patch.
        return _stack(visual._pool(_twice(patch))[0] @ visual.proj for patch in states[:, 1:].unbind(dim=1))
    if isinstance(visual, ModifiedResNet):
        features = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(images)))))
        visual.attnpool.positional_embedding = nn.Parameter(torch.zeros(2, features.shape[1]))
        return _stack(visual.attnpool(place[..., None, None]) for place in features.flatten(2).unbind(dim=2))
    states = visual.trunk.forward_features(images)
    if states.dim() == 3:
        prefix = visual.trunk.num_prefix_tokens
        alone = [_twice(patch)[:, : 1 + prefix] for patch in states[:, prefix:].unbind(dim=1)]
    elif getattr(visual.trunk, "output_fmt", "NCHW") == "NHWC":
        alone = [place[:, None, None] for place in states.flatten(1, 2).unbind(dim=1)]
    else:
        alone = [place[..., None, None] for place in states.flatten(2).unbind(dim=2)]
    return _stack(visual.head(visual.trunk.forward_head(place)) for place in alone)


def _twice(patch: Tensor) -> Tensor:
    return torch.stack([patch, patch], dim=1)


def _stack(pooled: object) -> Tensor:
    return torch.stack(list(pooled), dim=1)


def test_a_patch_embedding_is_the_pooled_feature_of_that_patch_alone(model: CLIP) -> None:
    images = images_for(model)
    patches, _ = model.encode_patches(images)
    assert_close(patches, pooled_alone(model.visual, images))


def test_the_pooled_feature_is_the_towers_own_bit_for_bit(model: CLIP) -> None:
    images = images_for(model)
    pooled, _, _, _ = forward_with_patches(model.visual, images)
    assert torch.equal(pooled, model.visual(images))


LINEARLY_POOLED = ("ViT avg", "timm ViT gap", "FastViT", "Swin")


@pytest.mark.parametrize("vision", LINEARLY_POOLED)
@given(seed=st.integers(0, 2**32), gain=st.floats(0.1, 2))
def test_where_pooling_is_a_mean_the_pooled_feature_is_the_mean_of_the_patches(
    vision: str, seed: int, gain: float
) -> None:
    model = surface_embeddings(clip(vision), ToyTokenizer()).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.visual.parameters():
            parameter.mul_(1 + gain * torch.randn(parameter.shape, generator=generator))
        images = torch.randn(images_for(model).shape, generator=generator)
        mean, pooled = model.encode_patches(images)[0].mean(dim=1), model.encode_image(images)
    assert_close(mean, pooled, rtol=1e-4, atol=1e-4 * pooled.abs().max().item())


def changes(model: CLIP, row: int, column: int, up_and_left: float = 0) -> Tensor:
    """How far each patch embedding moves when the pixels under one place (or so much further) change, [height, width].

    Kernels are made positive: random signs can hide where a receptive field has its centre.
    """
    with torch.no_grad():
        for module in model.visual.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.abs_()
    images = images_for(model, number=1)
    before, (height, width) = model.encode_patches(images)
    high, wide = images.shape[-2] // height, images.shape[-1] // width
    top, left = int((row - up_and_left) * high), int((column - up_and_left) * wide)
    changed = images.clone()
    changed[..., top : top + high, left : left + wide] += 3
    after, _ = model.encode_patches(changed)
    return rearrange((after - before).norm(dim=-1), "1 (h w) -> h w", h=height)


# Odd kernels with a stride of 2 centre a place on the upper left corner of the pixels it stands for.
SEEN_FROM_THE_CORNER = {"FastViT": [(1, 1), (1, 3), (2, 2), (3, 4)], "timm ViT ViTamin": [(1, 1), (1, 2)]}


@pytest.mark.parametrize("vision", VISION)
def test_patches_stand_row_by_row_in_their_own_place(vision: str) -> None:
    """Changing one patch's pixels changes the embedding at its place most."""
    model = surface_embeddings(clip(vision), ToyTokenizer()).eval()
    height, width = model.encode_patches(images_for(model))[1]
    corners = [(0, 0), (0, width - 1), (height - 1, 0), (height // 2, width // 2)]
    places, up_and_left = SEEN_FROM_THE_CORNER.get(vision, corners), 0.5 if vision in SEEN_FROM_THE_CORNER else 0
    for row, column in places:
        assert changes(model, row, column, up_and_left).argmax() == row * width + column


@pytest.mark.parametrize("vision", ["ModifiedResNet", "ConvNeXt"])
def test_a_convolutional_tower_sees_a_change_only_there_and_near_it(vision: str) -> None:
    model = surface_embeddings(clip(vision), ToyTokenizer()).eval()
    change = changes(model, 0, 0)
    far = torch.ones_like(change, dtype=torch.bool)
    far[:2, :2] = False
    assert change[far].max() < 0.01 * change[0, 0]


def test_the_grid_has_as_many_places_as_there_are_patches(model: CLIP) -> None:
    patches, (height, width) = model.encode_patches(images_for(model))
    assert patches.shape[1] == height * width


@pytest.mark.parametrize("vision", VISION)
def test_the_grid_is_the_towers(vision: str) -> None:
    model = surface_embeddings(clip(vision), ToyTokenizer()).eval()
    assert model.encode_patches(images_for(model))[1] == GRIDS.get(vision, (2, 3))


@pytest.mark.parametrize(("image_size", "grid"), [((16, 24), (2, 3)), ((32, 8), (4, 1)), (20, (2, 2))], ids=str)
def test_the_grid_is_height_by_width(image_size: object, grid: tuple[int, int]) -> None:
    model = CLIP(EMBED_DIM, {**VIT, "image_size": image_size}, TRANSFORMER)
    surface_embeddings(model, ToyTokenizer())
    patches, found = model.encode_patches(images_for(model))
    assert found == grid
    assert patches.shape[1] == grid[0] * grid[1]


@pytest.mark.parametrize("vision", ["ConvNeXt", "FastViT"])
def test_the_grid_follows_the_image_where_the_tower_takes_any_size(vision: str) -> None:
    model = surface_embeddings(clip(vision), ToyTokenizer()).eval()
    patches, grid = model.encode_patches(torch.randn(1, 3, 64, 96))
    assert grid == (2, 3)
    assert patches.shape[1] == 6


def test_the_grid_follows_the_image_where_positions_are_resampled() -> None:
    # timm's dynamic_img_size.
    model = clip("timm ViT gap")
    model.visual.trunk = timm.create_model("test_vit", num_classes=0)
    model.visual.head = nn.Linear(model.visual.trunk.num_features, EMBED_DIM)
    surface_embeddings(model, ToyTokenizer()).eval()
    patches, grid = model.encode_patches(torch.randn(1, 3, 64, 96))
    assert grid == (4, 6)
    assert patches.shape[1] == 24


@pytest.mark.parametrize("vision", VISION)
def test_a_patch_keeps_its_size_where_the_image_is_no_multiple_of_it(
    vision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = VISION[vision]
    height, width = to_2tuple(config["image_size"])
    rows, columns = GRIDS.get(vision, (2, 3))
    expected = height // rows, width // columns
    size = (144, 144) if vision == "ModifiedResNet" else (height + 3, width + 5)
    monkeypatch.setitem(VISION, vision, {**config, "image_size": 144 if vision == "ModifiedResNet" else size})
    shrunken = SHRUNKEN.get(config.get("timm_model_name"), {})
    if "img_size" in shrunken:
        monkeypatch.setitem(SHRUNKEN, config["timm_model_name"], {**shrunken, "img_size": size})
    model = surface_embeddings(clip(vision), ToyTokenizer()).eval()
    grid = model.encode_patches(torch.randn(1, 3, *size))[1]
    assert any(patches * side != pixels for patches, side, pixels in zip(grid, expected, size, strict=True))
    assert patch_size(model.visual, size, grid) == expected
    extent = patch_extent(model.visual, size, grid)
    assert extent == (grid[0] * expected[0] / size[0], grid[1] * expected[1] / size[1])


def test_a_tower_that_says_nothing_of_its_patches_divides_the_image_evenly() -> None:
    unknown = SimpleNamespace()
    assert patch_size(unknown, (10, 21), (4, 6)) == (2.5, 3.5)
    assert patch_extent(unknown, (10, 21), (4, 6)) == (1, 1)
