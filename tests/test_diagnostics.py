"""The three numbers about the alignment: against loops over single tokens, and by hand."""

import pytest
import reference
import torch
from hypothesis import given
from strategies import Batch, batches
from torch import Tensor, nn

from sparc_loss import SparcLoss
from sparc_loss._masks import usable_patches, valid_tokens
from sparc_loss._nearest import own_is_nearest
from sparc_loss.diagnostics import DIAGNOSED_PAIRS, NAMES, alignment_diagnostics
from sparc_loss.losses import FilipLoss


def metrics_of(batch: Batch, **changes: object) -> dict[str, Tensor]:
    names = ("patch_features", "token_features", "token_mask", "threshold", "alignment", "patch_mask", "region_mask")
    return alignment_diagnostics(**{**{name: getattr(batch, name) for name in names}, **changes})


@given(batches())
def test_they_are_those_of_the_slow_reference(batch: Batch) -> None:
    weights = batch.weights()
    masks = batch.patch_mask, batch.region_mask
    arguments = (
        weights,
        batch.patch_features,
        batch.token_features,
        valid_tokens(batch.token_features, batch.patch_features, batch.token_mask, *masks),
        usable_patches(weights.shape, weights.device, *masks),
    )
    expected = reference.alignment_diagnostics(*(argument.numpy() for argument in arguments))
    actual = metrics_of(batch)
    assert tuple(actual) == NAMES
    for name, (lowest, highest) in expected.items():
        assert lowest - 1e-9 <= actual[name].item() <= highest + 1e-9


@given(batches())
def test_they_are_between_0_and_1_and_have_no_gradient(batch: Batch) -> None:
    batch.patch_features.requires_grad_()
    for value in metrics_of(batch).values():
        assert -1e-9 <= value.item() <= 1 + 1e-9
        assert value.shape == ()
        assert not value.requires_grad


# Two tokens along the axes, and patches that are each one's own: e1, e2, and a third that neither likes.
AXES = torch.eye(3)[None]


def test_tokens_that_find_their_own_patch_are_all_right_and_keep_it_alone() -> None:
    values = alignment_diagnostics(AXES, AXES[:, :2], torch.ones(1, 2, dtype=torch.bool))
    assert {name: value.item() for name, value in values.items()} == pytest.approx(
        {"fine_grained_accuracy": 1, "patches_kept": 1 / 3, "alignment_entropy": 0}
    )


def test_cosines_less_than_a_millionth_apart_tie_and_a_tie_is_a_miss() -> None:
    cosine = torch.tensor([[[0.5, 0.5 - 9e-7], [0.5 - 2e-6, 0.5]]], dtype=torch.float64)
    assert own_is_nearest(cosine, torch.ones(1, 2, dtype=torch.bool)).tolist() == [[False, True]]


def test_tokens_that_see_all_patches_alike_keep_all_of_them() -> None:
    patches = torch.ones(1, 3, 3)
    values = alignment_diagnostics(patches, AXES[:, :2], torch.ones(1, 2, dtype=torch.bool))
    assert values["patches_kept"] == 1
    assert values["alignment_entropy"].item() == pytest.approx(1)
    # Both groups are the same, and a tie is a miss.
    assert values["fine_grained_accuracy"] == 0


def test_a_patch_that_is_padding_is_none_of_those_that_could_be_kept() -> None:
    mask = torch.tensor([[True, True, False]])
    values = alignment_diagnostics(AXES, AXES[:, :2], torch.ones(1, 2, dtype=torch.bool), patch_mask=mask)
    assert values["patches_kept"].item() == pytest.approx(1 / 2)


def test_bad_arguments_are_refused_by_name() -> None:
    patches, tokens, mask = torch.randn(3, 4, 2), torch.randn(2, 5, 2), torch.ones(2, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"token_features has B = 2 in shape .*, patch_features has B = 3"):
        alignment_diagnostics(patches, tokens, mask, pairs=2)
    with pytest.raises(TypeError, match="patch_features is a NoneType; expected a tensor"):
        alignment_diagnostics(None, tokens, mask)
    with pytest.raises(ValueError, match="pairs is 0"):
        alignment_diagnostics(patches[:2], tokens, mask, pairs=0)


def test_where_no_token_counts_they_are_0() -> None:
    values = alignment_diagnostics(AXES, AXES, torch.zeros(1, 3, dtype=torch.bool))
    assert all(value == 0 for value in values.values())


def test_only_the_first_pairs_are_looked_at() -> None:
    patches, tokens = torch.randn(DIAGNOSED_PAIRS + 3, 4, 5), torch.randn(DIAGNOSED_PAIRS + 3, 6, 5)
    mask = torch.ones(DIAGNOSED_PAIRS + 3, 6, dtype=torch.bool)
    first = alignment_diagnostics(patches[:DIAGNOSED_PAIRS], tokens[:DIAGNOSED_PAIRS], mask[:DIAGNOSED_PAIRS])
    assert alignment_diagnostics(patches, tokens, mask) == first
    assert alignment_diagnostics(patches, tokens, mask, pairs=DIAGNOSED_PAIRS + 3) != first


# Beside the loss


@pytest.fixture
def outputs() -> dict[str, Tensor]:
    return {
        "image_features": nn.functional.normalize(torch.randn(4, 8), dim=-1),
        "text_features": nn.functional.normalize(torch.randn(4, 8), dim=-1),
        "logit_scale": torch.tensor(5.0),
        "patch_features": torch.randn(4, 6, 8),
        "token_features": torch.randn(4, 5, 8),
        "token_mask": torch.ones(4, 5, dtype=torch.bool),
    }


def test_the_loss_returns_them_where_asked_beside_the_same_terms(outputs: dict[str, Tensor]) -> None:
    settings = {"threshold": 0.4, "alignment": "dense"}
    terms = SparcLoss(**settings)(**outputs, output_dict=True)
    measured = SparcLoss(**settings, diagnostics=True)(**outputs, output_dict=True)
    local = {name: outputs[name] for name in ("patch_features", "token_features", "token_mask")}
    assert measured == {**terms, **alignment_diagnostics(**local, **settings)}
    assert not any(name.endswith("_loss") for name in NAMES)


def test_they_are_no_part_of_the_scalar(outputs: dict[str, Tensor]) -> None:
    assert torch.equal(SparcLoss(diagnostics=True)(**outputs), SparcLoss()(**outputs))


def test_another_objective_has_none(outputs: dict[str, Tensor]) -> None:
    assert set(FilipLoss()(**outputs, output_dict=True)) == {"contrastive_loss", "fine_grained_loss"}
