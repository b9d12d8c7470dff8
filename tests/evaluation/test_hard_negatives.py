"""Hard negatives, against examples worked by hand."""

import doctest

import pytest
import torch

from sparc_loss.evaluation import HARD_NEGATIVE_CHANCE, hard_negative_accuracy, hard_negatives, swap_words

IMAGES = torch.tensor([[1.0, 0], [1, 0], [0, 5], [0, 5]])
TRUE = torch.tensor([[3.0, 1], [1, 1], [0, 1], [1, 0]])


def test_share_of_images_nearer_to_the_true_caption():
    swapped = torch.tensor([[1.0, 1], [3, 1], [1, 9], [-1, 1]])
    assert hard_negative_accuracy(IMAGES, TRUE, swapped) == 0.5


def test_a_tie_is_a_miss_so_a_bag_of_words_scores_nothing():
    assert hard_negative_accuracy(IMAGES, TRUE, TRUE * 2) == 0


def test_a_tie_by_rounding_is_a_tie():
    images, true = torch.randn(2, 200, 64)
    assert hard_negative_accuracy(images, true, true + 1e-8 * torch.randn(200, 64)) == 0


def test_random_captions_score_chance():
    images, true, swapped = torch.randn(3, 4000, 8)
    assert hard_negative_accuracy(images, true, swapped) == pytest.approx(HARD_NEGATIVE_CHANCE, abs=0.04)


def test_another_number_of_negatives_is_refused():
    with pytest.raises(ValueError, match=r"negative_features has N = 3 in shape \[3, 2\], image_features has N = 4"):
        hard_negative_accuracy(IMAGES, TRUE, TRUE[:3])


def test_no_image_is_refused():
    with pytest.raises(ValueError, match=r"image_features has shape \[0, 2\]; expected at least one image"):
        hard_negative_accuracy(*[torch.ones(0, 2)] * 3)


def test_nan_is_refused():
    with pytest.raises(ValueError, match="negative_features has values that are not finite"):
        hard_negative_accuracy(IMAGES, TRUE, TRUE / 0)


def test_the_example_in_the_docstring_holds():
    results = doctest.testmod(hard_negatives)
    assert results.attempted > 0
    assert results.failed == 0


def test_words_are_exchanged_and_nothing_else():
    assert swap_words("a red seven left of a blue star", 1, 6) == "a blue seven left of a red star"


def test_punctuation_stays_in_its_place():
    assert swap_words("here: (red), and blue!", 1, 3) == "here: (blue), and red!"


def test_the_articles_go_with_their_words():
    assert swap_words("a red eight and an orange star", 1, 5) == "an orange eight and a red star"


def test_a_capital_stays_in_its_place():
    assert swap_words("Red seven, blue star", 0, 2) == "Blue seven, red star"


def test_an_article_before_one_of_them_alone_stays():
    assert swap_words("an orange seven and two red stars", 1, 5) == "an red seven and two orange stars"


def test_the_last_word_does_not_stand_before_the_first():
    assert swap_words("red seven and a blue one or an", 0, 4) == "blue seven and a red one or an"


@pytest.mark.parametrize(("first", "second", "name"), [(3, 0, "first"), (0, -1, "second")])
def test_a_word_outside_the_caption_is_refused(first, second, name):
    with pytest.raises(ValueError, match=f"{name} is .*; expected a word of the caption, 0 to 2"):
        swap_words("a red seven", first, second)


def test_swapping_a_word_with_itself_is_refused():
    with pytest.raises(ValueError, match="first and second are both 1; expected two words"):
        swap_words("a red seven", 1, 1)
