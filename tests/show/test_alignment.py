"""Words aligned with patches, for every kind of tower."""

import numpy as np
import pytest
import tiny_models
import torch
from einops import rearrange
from open_clip.transform import image_transform
from open_clip.utils import to_2tuple
from PIL import Image
from tiny_models import GRIDS, VISION
from tiny_tokenizers import word_level
from torch import nn

from sparc_loss import surface_embeddings
from sparc_loss.functional import alignment_weights, token_patch_similarity
from sparc_loss.named_objects import NamedObject
from sparc_loss.show import align

CAPTION = "a red dog!"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return word_level(tmp_path_factory.mktemp("tokenizer"), None, pad="[PAD]")


def picture(width: int = 90, height: int = 70) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def preprocess_for(model: nn.Module):
    size = to_2tuple(model.visual.image_size)
    return image_transform(size, is_train=False, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))


def expected_weights(model, preprocess, tokenizer, reading="last", **options) -> torch.Tensor:
    """The loss's own weights of the four words, [4, P], from a surfaced model."""
    surface_embeddings(model, tokenizer).eval()
    with torch.no_grad():
        patches, _ = model.encode_patches(preprocess(picture()).unsqueeze(0), reading=reading)
        tokens, mask = model.encode_tokens(tokenizer([CAPTION]))
    assert mask[0].tolist() == [True] * 4 + [False] * 4
    return alignment_weights(token_patch_similarity(tokens, patches), **options)[0, :4]


@pytest.mark.parametrize("vision", VISION)
def test_the_weights_are_those_of_the_loss_on_the_towers_grid(tokenizer, vision):
    model = tiny_models.clip(vision)
    preprocess = preprocess_for(model)
    pair = align(picture(), CAPTION, model, preprocess, tokenizer)
    height, width = GRIDS.get(vision, (2, 3))
    expected = rearrange(expected_weights(model, preprocess, tokenizer), "l (h w) -> l h w", h=height, w=width)
    assert torch.equal(pair.weights, expected)
    assert pair.patch_size == tuple(
        side / patches for side, patches in zip(to_2tuple(model.visual.image_size), (height, width), strict=True)
    )
    assert torch.equal(pair.kept, (expected > 0).float().mean(dim=(1, 2)))


@pytest.mark.parametrize("make", [tiny_models.custom_text_clip, tiny_models.coca])
def test_the_weights_are_those_of_the_loss_for_other_models(tokenizer, make):
    model = make()
    preprocess = preprocess_for(model)
    pair = align(picture(), CAPTION, model, preprocess, tokenizer)
    assert torch.equal(pair.weights.flatten(1), expected_weights(model, preprocess, tokenizer))


@pytest.mark.parametrize("options", [{"threshold": 0.7}, {"method": "dense"}, {"method": "softmax"}])
def test_threshold_and_alignment_reach_the_weights(tokenizer, options):
    model = tiny_models.clip()
    preprocess = preprocess_for(model)
    given = {"alignment" if name == "method" else name: value for name, value in options.items()}
    pair = align(picture(), CAPTION, model, preprocess, tokenizer, **given)
    assert torch.equal(pair.weights.flatten(1), expected_weights(model, preprocess, tokenizer, **options))


def test_a_reading_reaches_the_patches(tokenizer):
    model = tiny_models.clip()
    preprocess = preprocess_for(model)
    pair = align(picture(), CAPTION, model, preprocess, tokenizer, reading="value")
    expected = expected_weights(model, preprocess, tokenizer, reading="value")
    assert torch.equal(pair.weights.flatten(1), expected)
    assert not torch.equal(expected, expected_weights(model, preprocess, tokenizer))


def test_a_word_of_several_pieces_has_the_mean_of_their_weights(tokenizer):
    model = tiny_models.clip()
    preprocess = preprocess_for(model)
    pair = align(picture(), "a dog's", model, preprocess, tokenizer)
    assert [word.positions for word in pair.caption.words] == [(0,), (1, 2, 3)]
    with torch.no_grad():
        surface_embeddings(model, tokenizer)
        patches, _ = model.encode_patches(preprocess(picture()).unsqueeze(0))
        tokens, _ = model.encode_tokens(tokenizer(["a dog's"]))
    weights = alignment_weights(token_patch_similarity(tokens, patches))[0]
    torch.testing.assert_close(pair.weights[1].flatten(), (weights[1] + weights[2] + weights[3]) / 3)


def test_pixels_that_a_vit_leaves_over_belong_to_no_patch(tokenizer, monkeypatch):
    monkeypatch.setitem(VISION, "ViT tok", {**VISION["ViT tok"], "image_size": (20, 31)})
    model = tiny_models.clip()
    pair = align(picture(), CAPTION, model, preprocess_for(model), tokenizer)
    assert pair.weights.shape == (4, 2, 3)
    assert pair.patch_size == (8, 8)


def test_the_image_is_the_one_the_model_sees(tokenizer):
    model = tiny_models.clip()
    preprocess = preprocess_for(model)
    pair = align(picture(24, 16), CAPTION, model, preprocess, tokenizer)
    assert np.array_equal(pair.pixels, np.asarray(picture(24, 16)))
    cropped = align(picture(48, 16), CAPTION, model, preprocess, tokenizer)
    assert np.array_equal(cropped.pixels, np.asarray(picture(48, 16))[:, 12:36])


@pytest.mark.parametrize("surfaced", [False, True])
def test_the_model_is_left_as_it_was(tokenizer, surfaced):
    model = tiny_models.clip()
    if surfaced:
        surface_embeddings(model, tokenizer, tokens="all")
    model.train()
    model.visual.eval()
    before = dict(vars(model))
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    kind, state = type(model), torch.get_rng_state()
    align(picture(), CAPTION, model, preprocess_for(model), tokenizer)
    assert type(model) is kind
    assert vars(model) == before
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_it_comes_back_from_a_failure(tokenizer):
    model = tiny_models.clip().train()
    kind = type(model)
    with pytest.raises(ValueError, match="threshold"):
        align(picture(), CAPTION, model, preprocess_for(model), tokenizer, threshold=2)
    assert model.training
    assert type(model) is kind


def test_half_precision_gives_weights_in_single(tokenizer):
    model = tiny_models.clip().to(torch.bfloat16)
    pair = align(picture(), CAPTION, model, preprocess_for(model), tokenizer)
    assert pair.weights.dtype == torch.float32
    torch.testing.assert_close(pair.weights.sum(dim=(1, 2)), torch.ones(4))


def test_a_file_is_the_image_in_it(tokenizer, tmp_path):
    model = tiny_models.clip()
    preprocess = preprocess_for(model)
    picture().save(tmp_path / "picture.png")
    from_file = align(tmp_path / "picture.png", CAPTION, model, preprocess, tokenizer)
    assert torch.equal(from_file.weights, align(picture(), CAPTION, model, preprocess, tokenizer).weights)


def test_an_image_that_cannot_be_read_is_one_error(tokenizer, tmp_path):
    model = tiny_models.clip()
    (tmp_path / "text.png").write_text("no image", encoding="utf-8")
    picture().save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    for name, message in {
        "none.png": "none.png cannot be read as an image: .*No such file",
        "text.png": "text.png cannot be read as an image: cannot identify image file",
        "half.png": "half.png cannot be read as an image: ",
    }.items():
        with pytest.raises(ValueError, match=message):
            align(tmp_path / name, CAPTION, model, preprocess_for(model), tokenizer)


def test_a_preprocess_that_tells_nothing_of_its_normalisation_is_refused(tokenizer):
    model = tiny_models.clip()
    preprocess = preprocess_for(model)
    with pytest.raises(TypeError, match="preprocess is a function; expected the torchvision Compose"):
        align(picture(), CAPTION, model, lambda image: preprocess(image), tokenizer)


def test_a_model_with_nan_is_refused(tokenizer):
    model = tiny_models.clip()
    nn.init.constant_(model.visual.proj, torch.nan)
    with pytest.raises(ValueError, match="model gives weights that are not finite for this pair"):
        align(picture(), CAPTION, model, preprocess_for(model), tokenizer)


class TestBoxes:
    """Of annotated objects, in the picture as the model sees it."""

    def test_follow_the_image_through_resizing_and_cropping(self, tokenizer):
        model = tiny_models.clip()
        preprocess = preprocess_for(model)  # the short side to 16 of 70, and the middle 24 of 90 / 70 * 16
        seen = align(
            picture(),
            CAPTION,
            model,
            preprocess,
            tokenizer,
            objects=[NamedObject("a red dog", (0, 0, 90, 70), (1, 2)), NamedObject("dog", (45, 35, 90, 70), (2,))],
        )
        height, width = seen.pixels.shape[:2]
        whole, corner = (box for box, _ in seen.boxes)
        assert whole == (0, 0, width, height)
        assert corner[2:] == (width, height)
        assert corner[0] == pytest.approx(width / 2, abs=1)
        assert corner[1] == pytest.approx(height / 2, abs=1)

    def test_belong_to_the_words_that_name_the_object(self, tokenizer):
        model = tiny_models.clip()
        objects = [NamedObject("a red dog", (0, 0, 90, 70), (1, 2)), NamedObject("it", (0, 0, 90, 70))]
        seen = align(picture(), CAPTION, model, preprocess_for(model), tokenizer, objects=objects)
        words = [seen.caption[word] for word in seen.caption.read]
        assert [[words[index] for index in each] for _, each in seen.boxes] == [["red", "dog", "!"], []]

    def test_are_left_out_where_they_were_cropped_away(self, tokenizer):
        model = tiny_models.clip()
        tall = picture(width=20, height=200)
        objects = [NamedObject("dog", (0, 0, 20, 10), (2,))]
        assert align(tall, CAPTION, model, preprocess_for(model), tokenizer, objects=objects).boxes == ()
