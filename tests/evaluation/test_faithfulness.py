"""K-Precision, against examples worked by hand."""

import math

import pytest
import torch

from sparc_loss.evaluation import k_precision, text_k_precision
from sparc_loss.evaluation.faithfulness import caption_words

CAPTIONS = ["A red seven.", "a blue star", "the RED star, red!"]
NOUNS_AND_ADJECTIVES = {"red", "blue", "seven", "star"}


def test_share_of_the_retrieved_words_that_the_images_own_captions_say():
    # Image 0 gets "a blue star": only "a". Image 1 its own. Image 2 gets "A red seven": only "red".
    result = k_precision(CAPTIONS, torch.tensor([1, 1, 0]))
    assert result.precision.tolist() == pytest.approx([1 / 3, 1, 1 / 3])


def test_every_occurrence_in_the_retrieved_caption_counts():
    # "the RED star, red!" for image 0: two of four words.
    assert k_precision(CAPTIONS, torch.tensor([2, 1, 2])).precision[0] == 0.5


def test_a_word_of_any_of_an_images_captions_will_do():
    result = k_precision(CAPTIONS, torch.tensor([2, 0]), image_index=torch.tensor([0, 0, 1]))
    # "the RED star, red!" for "A red seven." and "a blue star": all but "the".
    assert result.precision.tolist() == pytest.approx([3 / 4, 1 / 3])


def test_a_word_of_two_of_an_images_captions_is_still_said():
    captions, index = ["a dog", "a cat", "a bird"], torch.tensor([0, 0, 1])
    assert k_precision(captions, torch.tensor([2, 2]), index).precision.tolist() == [0.5, 1]


def test_only_nouns_and_adjectives_count_if_they_are_given():
    result = k_precision(CAPTIONS, torch.tensor([1, 1, 0]), counts=NOUNS_AND_ADJECTIVES)
    assert result.precision.tolist() == [0, 1, 0.5]


def test_a_tagger_may_say_which_words_count():
    by_set = k_precision(CAPTIONS, torch.tensor([1, 2, 0]), counts=NOUNS_AND_ADJECTIVES)
    by_tagger = k_precision(CAPTIONS, torch.tensor([1, 2, 0]), counts=lambda word: word not in ("a", "the"))
    assert torch.equal(by_set.precision, by_tagger.precision)
    assert torch.equal(by_set.chance, by_tagger.chance)


def test_an_empty_caption_has_no_precision():
    result = k_precision(["", "a star", "?!"], torch.tensor([0, 2, 1]))
    assert result.precision.isnan().tolist() == [True, True, False]
    assert result.precision[2] == 0
    assert result.chance.tolist() == [0, 1, 0]


def test_a_text_that_is_no_caption_of_the_data_has_a_precision_too():
    # "red" and "star" of "a red, RED star": "a" is in neither caption.
    assert text_k_precision("a red, RED star", ["The red seven", "one star"]) == 0.75
    assert text_k_precision("a red, RED star", ["The red seven"], NOUNS_AND_ADJECTIVES) == pytest.approx(2 / 3)
    assert text_k_precision("a blue star", []) == 0
    assert math.isnan(text_k_precision("a the", ["a the"], NOUNS_AND_ADJECTIVES))


@pytest.mark.parametrize("counts", [None, NOUNS_AND_ADJECTIVES])
def test_the_precision_of_a_text_is_that_of_a_retrieved_caption(counts):
    retrieved = torch.tensor([1, 2, 0])
    of_all = k_precision(CAPTIONS, retrieved, counts=counts).precision.tolist()
    of_each = [text_k_precision(CAPTIONS[other], [CAPTIONS[own]], counts) for own, other in enumerate([1, 2, 0])]
    assert of_each == of_all


def test_one_caption_in_place_of_several_is_refused():
    with pytest.raises(TypeError, match=r"captions is a str; expected a sequence of captions"):
        text_k_precision("a star", "a star")


def test_nothing_but_empty_captions_has_no_chance_either():
    result = k_precision(["", ""], torch.tensor([0, 1]))
    assert result.precision.isnan().all()
    assert result.chance.isnan().all()


@pytest.mark.parametrize("counts", [None, NOUNS_AND_ADJECTIVES])
def test_chance_is_the_mean_over_all_captions(counts):
    captions = [*CAPTIONS, "", "one two one"]
    index = torch.tensor([0, 1, 0, 2, 2])
    every = [k_precision(captions, torch.full((3,), i), index, counts).precision for i in range(len(captions))]
    expected = torch.stack(every).nanmean(dim=0)
    assert k_precision(captions, torch.tensor([0, 1, 2]), index, counts).chance.tolist() == pytest.approx(
        expected.tolist()
    )


def test_words_are_lower_case_without_punctuation():
    assert caption_words("The dog's snow-white BALL, no. 7 (é) _x_ - ...") == [
        "the",
        "dog's",
        "snow-white",
        "ball",
        "no",
        "7",
        "é",
        "x",
    ]


def test_a_caption_out_of_range_is_refused():
    with pytest.raises(ValueError, match="retrieved has the caption 3; expected 0 to 2"):
        k_precision(CAPTIONS, torch.tensor([0, 1, 3]))


def test_another_number_of_captions_without_an_index_is_refused():
    with pytest.raises(ValueError, match="captions has 3, retrieved 2; expected as many, or an image_index"):
        k_precision(CAPTIONS, torch.tensor([0, 1]))


def test_an_image_without_a_caption_is_refused():
    with pytest.raises(ValueError, match="image_index gives image 1 no caption"):
        k_precision(CAPTIONS, torch.tensor([0, 1]), torch.tensor([0, 0, 0]))


def test_one_string_for_all_captions_is_refused():
    with pytest.raises(TypeError, match="captions is a str; expected a sequence of captions"):
        k_precision("abc", torch.tensor([0, 1, 2]))


def test_retrieved_of_another_dtype_is_refused():
    with pytest.raises(TypeError, match=r"retrieved is torch\.float32 \[3\]; expected a tensor of torch\.int64"):
        k_precision(CAPTIONS, torch.ones(3))
