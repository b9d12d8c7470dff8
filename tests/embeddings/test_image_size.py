"""Images of another size than the model's: position embeddings as open_clip and timm interpolate them at loading."""

from types import SimpleNamespace

import pytest
import tiny_models
import torch
from open_clip.model import resize_pos_embed

from sparc_loss.embeddings import surface_embeddings
from sparc_loss.embeddings.image_size import at_image_size, check_image_size, model_image_size

TOKENIZER = tiny_models.ToyTokenizer()


def images(height, width):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_a_vit_of_open_clip_equals_one_whose_embeddings_open_clip_resized():
    # open_clip takes the old grid for a square.
    config = {**tiny_models.VIT, "image_size": 32}
    model, wide = (
        tiny_models._build(tiny_models.CLIP, 16, {**config, "image_size": size}, tiny_models.TRANSFORMER)
        for size in (32, (24, 56))
    )
    state_dict = model.state_dict()
    resize_pos_embed(state_dict, SimpleNamespace(visual=wide.visual))
    wide.load_state_dict(state_dict)
    for each in (model, wide):
        surface_embeddings(each, TOKENIZER).eval()
    patches, grid = model.encode_patches(images(24, 56))
    assert grid == (3, 7)
    assert torch.equal(patches, wide.encode_patches(images(24, 56))[0])


@pytest.mark.parametrize("vision", ["timm ViT map", "timm ViT token", "timm ViT MobileCLIP", "Eva", "Eva PE"])
@torch.no_grad()
def test_a_vit_of_timm_equals_one_whose_size_timm_set(vision):
    model, wide = (surface_embeddings(tiny_models.clip(vision), TOKENIZER).eval() for _ in range(2))
    height, width = model_image_size(model.visual)
    wide.visual.trunk.set_input_size(img_size=(height, 2 * width))
    patches, grid = model.encode_patches(images(height, 2 * width))
    expected, wide_grid = wide.encode_patches(images(height, 2 * width))
    assert grid == wide_grid
    assert torch.equal(patches, expected)


@pytest.mark.parametrize("vision", ["ViT tok", "timm ViT map", "Eva"])
@torch.no_grad()
def test_the_model_is_its_own_again_afterwards_also_after_an_error(vision):
    model = surface_embeddings(tiny_models.clip(vision), TOKENIZER).eval()
    own = tiny_models.images_for(model)
    before, parameters = model.encode_patches(own)[0], dict(model.named_parameters())
    height, width = model_image_size(model.visual)
    larger = images(2 * height, width)
    for reading in ("last", "clear"):
        model.encode_patches(larger, reading=reading)
    with pytest.raises(RuntimeError):
        model.encode_patches(larger.double())
    assert torch.equal(model.encode_patches(own)[0], before)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


@pytest.mark.parametrize("vision", ["ViT tok", "timm ViT map", "Eva", "Eva PE"])
def test_another_size_within_inference_mode_leaves_a_model_that_trains(vision):
    model = surface_embeddings(tiny_models.custom_text_clip(vision), TOKENIZER)
    buffers = dict(model.named_buffers())
    height, width = model_image_size(model.visual)
    with torch.inference_mode():
        model.encode_patches(images(2 * height, width))
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())
    model.train().encode_patches(tiny_models.images_for(model))[0].sum().backward()


@torch.no_grad()
def test_pixels_beyond_the_last_whole_patch_are_left_out():
    model = surface_embeddings(tiny_models.clip("ViT tok"), TOKENIZER).eval()
    patches, grid = model.encode_patches(images(29, 47))
    assert grid == (3, 5)
    assert torch.equal(patches, model.encode_patches(images(29, 47)[:, :, :24, :40])[0])


@pytest.mark.parametrize(
    ("vision", "name", "size"),
    [
        ("ModifiedResNet", "ModifiedResNet", "128 x 128"),
        ("Swin", "SwinTransformer", "128 x 160"),
        ("timm ViT relpos", "VisionTransformerRelPos", "32 x 48"),
    ],
)
def test_a_tower_of_one_size_is_refused_by_name(vision, name, size):
    visual = tiny_models.clip(vision).visual
    with pytest.raises(ValueError, match="takes images of") as error, at_image_size(visual, (64, 72)):
        pass
    assert str(error.value) == f"model.visual is a {name}, which takes images of {size} pixels only; found 64 x 72"
    check_image_size(visual, model_image_size(visual))


@torch.no_grad()
def test_convolutions_take_any_size():
    model = surface_embeddings(tiny_models.clip("ConvNeXt"), TOKENIZER).eval()
    assert model.encode_patches(images(64, 96))[1] == (2, 3)


@pytest.mark.parametrize(("vision", "patch"), [("ViT tok", 8), ("timm ViT map", 16), ("Eva", 16)])
def test_an_image_without_a_patch_is_refused(vision, patch):
    with pytest.raises(ValueError, match="images are") as error:
        check_image_size(tiny_models.clip(vision).visual, (patch - 1, 64))
    assert str(error.value) == f"images are {patch - 1} x 64 pixels; expected at least one patch, {patch} x {patch}"
