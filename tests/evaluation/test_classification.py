"""Zero-shot classification, against examples worked by hand."""

import open_clip
import pytest
import torch

from sparc_loss.evaluation import recall_chance, top_k_accuracy

# Three classes, each an axis of the space.
CLASSES = torch.eye(3)


def test_share_of_images_whose_class_is_among_the_nearest():
    images = torch.tensor([[3.0, 2, 1], [3, 2, 1], [3, 2, 1], [0, 0, 1]])
    target = torch.tensor([0, 1, 2, 2])
    assert [top_k_accuracy(images, CLASSES, target, k) for k in (1, 2, 3)] == [0.5, 0.75, 1.0]


def test_of_classes_that_tie_the_first_is_nearest():
    images, target = torch.tensor([[1.0, 1, 0], [1, 1, 0]]), torch.tensor([0, 1])
    assert [top_k_accuracy(images, CLASSES, target, k) for k in (1, 2)] == [0.5, 1]


def test_where_all_tie_the_accuracy_is_chance():
    images, target = torch.ones(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    assert [top_k_accuracy(images, CLASSES, target, k) for k in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1])


def test_scale_of_the_features_does_not_matter():
    images, classes, target = torch.randn(30, 4), torch.randn(5, 4), torch.randint(5, (30,))
    scaled = top_k_accuracy(images * (torch.rand(30, 1) + 0.1), classes * (torch.rand(5, 1) + 0.1), target, 2)
    assert scaled == top_k_accuracy(images, classes, target, 2)


@pytest.mark.parametrize("k", [1, 2])
def test_agrees_with_scikit_learn_where_nothing_ties(k):
    metrics = pytest.importorskip("sklearn.metrics")
    images, target = torch.nn.functional.normalize(torch.randn(200, 6), dim=-1), torch.randint(6, (200,))
    expected = metrics.top_k_accuracy_score(target, images, k=k, labels=range(6))
    assert top_k_accuracy(images, torch.eye(6), target, k) == pytest.approx(expected)


def test_takes_the_classifier_that_open_clip_builds():
    class Model:
        """Embeds a text, here a pair of numbers, as itself."""

        def encode_text(self, texts, normalize):
            assert normalize
            return texts / texts.norm(dim=-1, keepdim=True)

    def tokenizer(texts):
        return torch.tensor([[float(number) for number in text.split()] for text in texts])

    classifier = open_clip.build_zero_shot_classifier(Model(), tokenizer, ["1", "-1"], ["{} 0", "0 {}"])
    images = torch.tensor([[1.0, 1], [-1, -1], [-2, -2]])
    assert top_k_accuracy(images, classifier.T, torch.tensor([0, 1, 0])) == pytest.approx(2 / 3)


def test_random_features_score_chance():
    accuracy = top_k_accuracy(torch.randn(4000, 16), torch.randn(10, 16), torch.randint(10, (4000,)), 3)
    assert accuracy == pytest.approx(recall_chance(10, 3), abs=0.04)


@pytest.mark.parametrize("k", [0, 4])
def test_k_out_of_range_is_refused(k):
    with pytest.raises(ValueError, match=f"k is {k} with 3 candidates"):
        top_k_accuracy(torch.ones(1, 3), CLASSES, torch.tensor([0]), k)


@pytest.mark.parametrize("label", [-1, 3])
def test_a_class_out_of_range_is_refused(label):
    with pytest.raises(ValueError, match=f"target has the class {label}; expected 0 to 2"):
        top_k_accuracy(torch.ones(2, 3), CLASSES, torch.tensor([0, label]))


def test_targets_for_other_images_are_refused():
    with pytest.raises(ValueError, match=r"target has shape \[1\]; expected \[N\] = \[2\], N at least 1"):
        top_k_accuracy(torch.ones(2, 3), CLASSES, torch.tensor([0]))


def test_no_image_is_refused():
    with pytest.raises(ValueError, match=r"target has shape \[0\]; expected \[N\] = \[0\], N at least 1"):
        top_k_accuracy(torch.ones(0, 3), CLASSES, torch.tensor([], dtype=torch.long))


def test_targets_of_another_dtype_are_refused():
    with pytest.raises(TypeError, match=r"target has dtype torch\.float32; expected a tensor of torch\.int64"):
        top_k_accuracy(torch.ones(1, 3), CLASSES, torch.ones(1))


def test_nan_is_refused():
    with pytest.raises(ValueError, match="class_features has values that are not finite"):
        top_k_accuracy(torch.ones(1, 3), CLASSES / 0, torch.tensor([0]))
