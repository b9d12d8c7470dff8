"""The probe tells a fine-grained loss that looks at the image from one that does not."""

import math

import pytest
import torch

from sparc_loss.evaluation import image_dependence, mean_image_dependence
from sparc_loss.functional import alignment_weights, fine_grained_loss

BATCH, WORDS = 4, 3
MASK = torch.ones(BATCH, WORDS, dtype=torch.bool)
SCALE = 20.0


def words_of_their_own() -> torch.Tensor:
    """Token embeddings [4, 3, 12], every word of every caption another axis."""
    return torch.eye(BATCH * WORDS).view(BATCH, WORDS, -1)


def test_an_image_that_shows_its_own_words_alone_is_needed():
    tokens = words_of_their_own()
    patches = tokens.flip(1)  # one patch per word of the caption
    probe = image_dependence(patches, tokens, MASK, SCALE)
    assert probe.right.token_accuracy == probe.right.group_accuracy == 1
    assert probe.right.loss < 1e-6
    for wrong in (probe.shuffled, probe.constant):
        # No patch resembles any word: all groups are one, and match none.
        assert wrong.token_accuracy == wrong.group_accuracy == 0
        assert wrong.loss == pytest.approx(math.log(WORDS))
    assert probe.shuffled_gap == pytest.approx((math.log(WORDS), 1, 1))
    assert probe.constant_gap == pytest.approx((math.log(WORDS), 1, 1))


def test_any_image_whose_patches_span_the_words_will_do():
    # Every image has a patch for every word there is, in an order of its own: the loss is low, and sees nothing.
    tokens = words_of_their_own()
    axes = torch.eye(BATCH * WORDS)
    patches = torch.stack([axes.roll(shift, dims=0) for shift in range(BATCH)])
    probe = image_dependence(patches, tokens, MASK, SCALE)
    assert probe.right == probe.shuffled
    assert probe.right.token_accuracy == 1
    assert probe.right.loss < 1e-6
    assert probe.shuffled_gap == (0, 0, 0)


def test_an_image_that_never_varies_is_not_needed_either():
    tokens = words_of_their_own()
    patches = torch.eye(BATCH * WORDS).expand(BATCH, -1, -1)
    probe = image_dependence(patches, tokens, MASK, SCALE)
    assert probe.constant_gap == pytest.approx((0, 0, 0), abs=1e-6)


def test_constant_holds_nothing_of_the_captions_own_image():
    patches, tokens = torch.randn(BATCH, 5, 8), torch.randn(BATCH, WORDS, 8)
    mask = torch.zeros_like(MASK)
    mask[2] = True
    before = image_dependence(patches, tokens, mask, SCALE)
    patches[2] = torch.randn(5, 8)
    after = image_dependence(patches, tokens, mask, SCALE)
    assert after.constant == pytest.approx(before.constant)
    assert after.shuffled == pytest.approx(before.shuffled)
    assert after.right != pytest.approx(before.right)


def test_of_two_images_the_other_is_both_shuffled_and_constant():
    probe = image_dependence(torch.randn(2, 5, 8), torch.randn(2, WORDS, 8), MASK[:2], SCALE)
    assert probe.shuffled == pytest.approx(probe.constant)


@pytest.mark.parametrize("alignment", ["sparse", "dense", "softmax"])
def test_the_losses_are_those_of_the_objective(alignment):
    patches, tokens = torch.randn(BATCH, 5, 8), torch.randn(BATCH, WORDS, 8)
    mask = torch.tensor([[True, True, False], [True, False, True], [False] * 3, [True] * 3])
    probe = image_dependence(patches, tokens, mask, SCALE, threshold=0.6, alignment=alignment)
    constant = torch.stack([torch.cat([patches[:row], patches[row + 1 :]]).mean(dim=0) for row in range(BATCH)])
    for measured, shown in (
        (probe.right, patches),
        (probe.shuffled, patches[[1, 2, 3, 0]]),
        (probe.constant, constant),
    ):
        expected = fine_grained_loss(shown, tokens, mask, SCALE, threshold=0.6, alignment=alignment)
        assert measured.loss == pytest.approx(expected.item(), rel=1e-5)


def test_accuracies_by_hand():
    # Two patches at 0 and 90 degrees; with the threshold 1 each word takes its best patch alone. The words at 0 and 30
    # share the patch at 0, that at 80 has the other: the tie of the first two is a miss.
    angles = torch.deg2rad(torch.tensor([[0.0, 30, 80], [0, 90, 45]]))
    tokens = torch.stack([angles.cos(), angles.sin()], dim=-1)
    patches = torch.eye(2).expand(2, -1, -1)
    mask = torch.tensor([[True, True, True], [False, False, False]])
    right = image_dependence(patches, tokens, mask, SCALE, threshold=1.0).right
    assert right.token_accuracy == pytest.approx(1 / 3)
    # The group at 0 is nearest to the word at 0, which is its own; the group of the word at 30 is the same: a miss.
    assert right.group_accuracy == pytest.approx(2 / 3)


def test_accuracies_of_a_loop_over_single_tokens():
    patches, tokens, mask = torch.randn(6, 9, 4), torch.randn(6, 7, 4), torch.rand(6, 7) < 0.6
    probe = image_dependence(patches, tokens, mask, SCALE, threshold=0.5)
    found, finds = [], []
    for image, caption, valid in zip(patches, tokens, mask, strict=True):
        words = caption[valid]
        weights = alignment_weights((words @ image.T)[None], threshold=0.5)[0]
        groups = [sum(weight * patch for weight, patch in zip(row, image, strict=True)) for row in weights]
        for own, word in enumerate(words):
            cosines = [torch.cosine_similarity(word, group, dim=0).item() for group in groups]
            found.append(cosines.index(max(cosines)) == own)
            cosines = [torch.cosine_similarity(groups[own], other, dim=0).item() for other in words]
            finds.append(cosines.index(max(cosines)) == own)
    assert probe.right.token_accuracy == pytest.approx(sum(found) / len(found))
    assert probe.right.group_accuracy == pytest.approx(sum(finds) / len(finds))
    assert 0 < sum(finds) < len(finds)


def test_the_order_of_tokens_and_of_patches_does_not_matter():
    patches, tokens, mask = torch.randn(6, 9, 4), torch.randn(6, 7, 4), torch.rand(6, 7) < 0.6
    probe = image_dependence(patches, tokens, mask, SCALE)
    places, positions = torch.randperm(9), torch.randperm(7)
    other = image_dependence(patches[:, places], tokens[:, positions], mask[:, positions], SCALE)
    for name in ("right", "shuffled", "constant"):
        assert getattr(other, name) == pytest.approx(getattr(probe, name), rel=1e-4)


def test_padding_is_no_candidate():
    tokens, patches = words_of_their_own(), words_of_their_own()
    mask = MASK.clone()
    mask[:, 2] = False
    tokens[:, 2] = tokens[:, 0]  # would tie with the first word
    tokens[0, 2] = torch.nan
    probe = image_dependence(patches, tokens, mask, SCALE)
    assert probe.right.token_accuracy == probe.right.group_accuracy == 1
    assert probe.tokens == 2 * BATCH


def test_chance_is_one_of_the_captions_tokens():
    mask = torch.tensor([[True, True, True], [True, False, False], [False] * 3, [True, True, False]])
    probe = image_dependence(torch.randn(4, 5, 8), torch.randn(4, 3, 8), mask, SCALE)
    assert probe.tokens == 6
    assert probe.chance == pytest.approx((3 * (1 / 3) + 1 * 1 + 2 * (1 / 2)) / 6)


def test_random_embeddings_beat_chance_on_any_image():
    mask = torch.ones(200, 5, dtype=torch.bool)
    probe = image_dependence(torch.randn(200, 16, 32), torch.randn(200, 5, 32), mask, SCALE)
    assert min(probe.right.token_accuracy, probe.shuffled.token_accuracy) > probe.chance + 0.3
    assert probe.shuffled_gap.token_accuracy == pytest.approx(0, abs=0.1)


def test_batches_average_over_their_tokens():
    patches, tokens, mask = torch.randn(4, 5, 8), torch.randn(4, 3, 8), torch.rand(4, 3) < 0.7
    mask[:, 0] = True
    halves = [image_dependence(patches[half], tokens[half], mask[half], SCALE) for half in (slice(2), slice(2, 4))]
    mean, whole = mean_image_dependence(halves), image_dependence(patches, tokens, mask, SCALE)
    assert mean.right == pytest.approx(whole.right)
    assert mean.chance == pytest.approx(whole.chance)
    assert mean.tokens == whole.tokens
    weights = [half.tokens / whole.tokens for half in halves]
    assert mean.constant.loss == pytest.approx(sum(w * h.constant.loss for w, h in zip(weights, halves, strict=True)))
    assert mean.shuffled.loss == pytest.approx(sum(w * h.shuffled.loss for w, h in zip(weights, halves, strict=True)))


def test_half_precision_is_measured_in_float32():
    patches, tokens = torch.randn(BATCH, 5, 8).bfloat16(), torch.randn(BATCH, WORDS, 8).bfloat16()
    half = image_dependence(patches, tokens, MASK, SCALE)
    assert half == image_dependence(patches.float(), tokens.float(), MASK, SCALE)


def test_nothing_is_recorded_for_the_gradient():
    tokens = torch.randn(BATCH, WORDS, 8, requires_grad=True)
    scale = torch.tensor(SCALE, requires_grad=True)
    assert image_dependence(torch.randn(BATCH, 5, 8), tokens, MASK, scale).right.loss > 0


def test_a_single_image_cannot_be_shuffled():
    with pytest.raises(ValueError, match="patch_features has B = 1; expected 2 or more images, to shuffle them"):
        image_dependence(torch.randn(1, 5, 8), torch.randn(1, 3, 8), MASK[:1], SCALE)


def test_a_batch_without_a_word_is_refused():
    with pytest.raises(ValueError, match="token_mask is False everywhere; expected a valid token"):
        image_dependence(torch.randn(4, 5, 8), torch.randn(4, 3, 8), ~MASK, SCALE)


def test_nan_is_refused():
    with pytest.raises(ValueError, match="token_features has values that are not finite"):
        image_dependence(torch.randn(4, 5, 8), torch.full((4, 3, 8), torch.nan), MASK, SCALE)


def test_no_batch_has_no_mean():
    with pytest.raises(ValueError, match="batches is empty; expected at least one"):
        mean_image_dependence([])
