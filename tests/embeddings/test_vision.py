"""Patch embeddings: each is what the pooled feature would be of an image of that one patch."""

import pytest
import timm
import torch
from open_clip import CLIP
from open_clip.transformer import VisionTransformer
from tiny_models import EMBED_DIM, TRANSFORMER, VISION, VIT, ToyTokenizer, clip, images_for
from torch import Tensor, nn
from torch.testing import assert_close

from sparc_loss import surface_embeddings
from sparc_loss.embeddings.vision import encode_pooled_and_patches


@pytest.fixture(params=VISION)
def model(request: pytest.FixtureRequest) -> CLIP:
    return surface_embeddings(clip(request.param), ToyTokenizer()).eval()


def pooled_alone(visual: nn.Module, images: Tensor) -> Tensor:
    """The slow way: hand the tower's own pooling one patch at a time, in the place of all tokens."""
    states = last_states(visual, images)
    prefix = 1 if isinstance(visual, VisionTransformer) else visual.trunk.num_prefix_tokens
    pooled = []
    for patch in states[:, prefix:].unbind(dim=1):
        # Whatever the pool reads (class token, mean of patches, all by attention), it finds this patch.
        alone = patch[:, None].repeat(1, prefix + 1, 1)
        if isinstance(visual, VisionTransformer):
            pooled.append(visual._pool(alone)[0] @ visual.proj)
        else:
            pooled.append(visual.head(visual.trunk.forward_head(alone)))
    return torch.stack(pooled, dim=1)


def last_states(visual: nn.Module, images: Tensor) -> Tensor:
    if isinstance(visual, VisionTransformer):
        return visual.transformer(visual._embeds(images))
    return visual.trunk.forward_features(images)


def test_a_patch_embedding_is_the_pooled_feature_of_that_patch_alone(model: CLIP) -> None:
    images = images_for(model)
    patches, _ = model.encode_patches(images)
    assert_close(patches, pooled_alone(model.visual, images))


def test_the_pooled_feature_is_the_towers_own_bit_for_bit(model: CLIP) -> None:
    images = images_for(model)
    pooled, _ = encode_pooled_and_patches(model.visual, images)
    assert torch.equal(pooled, model.visual(images))


@pytest.mark.parametrize("vision", ["ViT avg", "timm ViT avg"])
def test_where_pooling_is_a_mean_the_pooled_feature_is_the_mean_of_the_patches(vision: str) -> None:
    model = surface_embeddings(clip(vision), ToyTokenizer()).eval()
    images = images_for(model)
    assert_close(model.encode_patches(images)[0].mean(dim=1), model.encode_image(images))


def test_patches_stand_row_by_row_in_their_own_place(model: CLIP) -> None:
    """Changing one patch's pixels changes the embedding at its place most."""
    images = images_for(model, number=1)
    before, (height, width) = model.encode_patches(images)
    size = images.shape[-1] // width
    for row, column in ((0, 0), (0, width - 1), (height - 1, 0), (height // 2, width // 2)):
        changed = images.clone()
        changed[..., row * size : (row + 1) * size, column * size : (column + 1) * size] += 3
        change = (model.encode_patches(changed)[0] - before).norm(dim=-1).flatten()
        assert change.argmax() == row * width + column


def test_the_grid_has_as_many_places_as_there_are_patches(model: CLIP) -> None:
    patches, (height, width) = model.encode_patches(images_for(model))
    assert patches.shape[1] == height * width


@pytest.mark.parametrize(("image_size", "grid"), [((16, 24), (2, 3)), ((32, 8), (4, 1)), (20, (2, 2))], ids=str)
def test_the_grid_is_height_by_width(image_size: object, grid: tuple[int, int]) -> None:
    model = CLIP(EMBED_DIM, {**VIT, "image_size": image_size}, TRANSFORMER)
    surface_embeddings(model, ToyTokenizer())
    patches, found = model.encode_patches(images_for(model))
    assert found == grid
    assert patches.shape[1] == grid[0] * grid[1]


def test_the_grid_follows_the_image_where_the_tower_takes_any_size() -> None:
    # timm's dynamic_img_size, as test_vit has it.
    model = surface_embeddings(clip("timm ViT avg"), ToyTokenizer()).eval()
    patches, grid = model.encode_patches(torch.randn(1, 3, 64, 96))
    assert grid == (4, 6)
    assert patches.shape[1] == 24


def test_the_grid_of_a_tower_with_a_convolutional_stem() -> None:
    # Patches of 8 x 8 places of a feature map that the stem has made 4 times smaller.
    model = clip("timm ViT avg")
    model.visual.trunk = timm.create_model("vit_tiny_r_s16_p8_224", depth=1, num_classes=0, img_size=64)
    model.visual.head = nn.Linear(model.visual.trunk.num_features, EMBED_DIM)
    surface_embeddings(model, ToyTokenizer())
    patches, grid = model.eval().encode_patches(torch.randn(1, 3, 64, 64))
    assert grid == (2, 2)
    assert patches.shape[1] == 4
