"""Region masks behind the token ids, and a model that takes them off again."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import ToyTokenizer, captions, clip, custom_text_clip, images_for

from sparc_loss import SparcLoss, surface_embeddings
from sparc_loss.regions.behind_texts import RegionSizes, packed, sizes_for, take_regions, unpacked


@given(st.integers(1, 4), st.integers(1, 9), st.tuples(st.integers(1, 9), st.integers(1, 9)), st.integers(0, 2**31))
def test_what_is_packed_is_unpacked(batch, length, grid, seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = RegionSizes(5, length, grid)
    ids = torch.randint(0, 49408, (batch, 5), generator=generator)
    masks = torch.rand(batch, length, sizes.patches, generator=generator) < 0.5
    texts = torch.stack([torch.cat([row, packed(mask)]) for row, mask in zip(ids, masks, strict=True)])
    assert texts.shape == (batch, 5 + sizes.packed)
    found_ids, found_masks = unpacked(texts, sizes)
    assert torch.equal(found_ids, ids)
    assert torch.equal(found_masks, masks)


def prepared(make=clip):
    model = surface_embeddings(make(), ToyTokenizer())
    return take_regions(model, sizes_for(model)).train()


@pytest.mark.parametrize("make", [clip, custom_text_clip])
def test_the_model_returns_the_mask_and_is_otherwise_the_same(make):
    model = prepared(make)
    plain = surface_embeddings(make(), ToyTokenizer()).train()
    plain.load_state_dict(model.state_dict())
    sizes, texts = sizes_for(model), captions()
    masks = torch.rand(len(texts), sizes.length, sizes.patches) < 0.5
    behind = torch.cat([texts, torch.stack([packed(mask) for mask in masks])], dim=1)
    output, expected = model(images_for(model), behind), plain(images_for(plain), texts)
    assert torch.equal(output.pop("region_mask"), masks)
    assert output.keys() == expected.keys()
    assert all(torch.equal(output[name], expected[name]) for name in expected)


def test_texts_without_a_mask_are_what_they_were():
    model = prepared()
    assert "region_mask" not in model(images_for(model), captions())
    assert set(model.eval()(images_for(model), captions())) == {"image_features", "text_features", "logit_scale"}
    assert model.encode_text(captions()).shape[0] == len(captions())


@pytest.mark.parametrize("round_trip", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_take_regions_too(round_trip):
    model = prepared()
    sizes, texts = sizes_for(model), captions()
    behind = torch.cat([texts, torch.ones(len(texts), sizes.packed, dtype=torch.long)], dim=1)
    again = round_trip(model)
    assert type(again) is type(model)
    assert torch.equal(again(images_for(model), behind)["region_mask"], unpacked(behind, sizes)[1])


def test_sizes_leave_the_mode_of_each_part_alone():
    model = prepared()
    model.visual.eval()
    before = [module.training for module in model.modules()]
    sizes_for(model)
    assert [module.training for module in model.modules()] == before


def test_sizes_have_the_share_of_the_image_that_the_patches_cover():
    model = surface_embeddings(clip(), ToyTokenizer())
    model.visual.image_size = (20, 36)  # patches of 8 pixels
    sizes = sizes_for(model)
    assert (sizes.grid, sizes.extent) == ((2, 4), (0.8, pytest.approx(32 / 36)))


def test_the_loss_uses_it():
    model = prepared()
    sizes, texts = sizes_for(model), captions()
    masks = torch.ones(len(texts), sizes.length, sizes.patches, dtype=torch.bool)
    masks[..., 1:] = False
    behind = torch.cat([texts, torch.stack([packed(mask) for mask in masks])], dim=1)
    loss = SparcLoss(global_weight=0)
    restricted = loss(**model(images_for(model), behind))
    assert restricted != loss(**model(images_for(model), texts))
    output = model(images_for(model), texts)
    assert torch.equal(restricted, loss(**output, region_mask=masks))


def test_sizes_of_a_model_in_half_precision():
    model = surface_embeddings(clip(), ToyTokenizer())
    assert sizes_for(model.bfloat16()) == sizes_for(surface_embeddings(clip(), ToyTokenizer()))


def test_sizes_are_those_of_the_embeddings_and_leave_the_mode_alone():
    model = surface_embeddings(clip(), ToyTokenizer()).train()
    sizes = sizes_for(model)
    output = model(images_for(model), captions())
    assert model.training
    assert (sizes.length, sizes.patches) == (output["token_features"].shape[1], output["patch_features"].shape[1])
    assert sizes.ids == captions().shape[1] == model.context_length
