"""Captioning: decoder, searches and CIDEr against slow references, and the command on scenes learnt by heart."""

import math
import re
from collections import Counter

import pytest
import torch
from easy_scenes import SQUARES, caption, write_scenes, write_untrained
from torch import Tensor

from examples.captioning.command import main
from examples.captioning.decoder import Captioner
from examples.captioning.scores import CIDER_MAXIMUM, caption_scores, cider
from examples.captioning.vocabulary import END, PAD, START, UNKNOWN, Vocabulary

WIDTH, WORDS, LENGTH = 12, 20, 6


@pytest.fixture
def captioner() -> Captioner:
    torch.manual_seed(0)
    captioner = Captioner(WIDTH, WORDS, LENGTH, width=16, pairs=2, heads=2).eval()
    # Sharper than at the beginning, so that greedy and beams have something to choose.
    torch.nn.init.normal_(captioner.decoder.lm_head.weight)
    return captioner


def open_gates(captioner: Captioner) -> None:
    gates = [gate for name, gate in captioner.named_parameters() if re.search(r"cross_attn_(attn|mlp)_gate$", name)]
    assert len(gates) == 4
    for gate in gates:
        torch.nn.init.constant_(gate, 0.7)


def logits(captioner: Captioner, patches: Tensor, ids: Tensor) -> Tensor:
    states = captioner.patches(patches)
    return captioner.decoder(input_ids=ids, cross_attention_states=states, use_cache=False).logits


def test_captions_become_numbers_and_come_back():
    vocabulary = Vocabulary(["A red seven, and a star", "a star"])
    assert vocabulary.words[4:] == ["a", "star", "and", "red", "seven"]  # by frequency, then by the alphabet
    ids = vocabulary.encode(["A star.", "a blue seven"], length=5)
    assert ids.tolist() == [[START, 4, 5, END, PAD], [START, 4, UNKNOWN, 8, END]]
    assert vocabulary.decode(ids) == ["a star", "a seven"]


def test_a_vocabulary_keeps_the_most_frequent_words_and_a_caption_its_first():
    vocabulary = Vocabulary(["b b b a a c"], size=2)
    assert vocabulary.words[4:] == ["b", "a"]
    assert vocabulary.encode(["a b a b"], length=2).tolist() == [[START, 5, 4, END]]


def test_the_decoder_begins_as_a_language_model(captioner):
    """Flamingo's gates are closed at first: the image makes no difference."""
    ids = torch.randint(4, WORDS, (2, LENGTH))
    one, other = torch.randn(2, 7, WIDTH), torch.randn(2, 7, WIDTH)
    assert torch.equal(logits(captioner, one, ids), logits(captioner, other, ids))
    open_gates(captioner)
    assert not torch.allclose(logits(captioner, one, ids), logits(captioner, other, ids), atol=1e-3)


def test_a_word_does_not_see_those_after_it(captioner):
    open_gates(captioner)
    ids, patches = torch.randint(4, WORDS, (1, LENGTH)), torch.randn(1, 7, WIDTH)
    changed = ids.clone()
    changed[0, 4:] = 4 + (changed[0, 4:] - 3) % (WORDS - 4)
    before, after = logits(captioner, patches, ids), logits(captioner, patches, changed)
    assert torch.allclose(before[:, :4], after[:, :4], atol=1e-5)
    assert not torch.allclose(before[:, 4:], after[:, 4:], atol=1e-3)


def test_every_word_sees_every_patch(captioner):
    open_gates(captioner)
    ids, patches = torch.randint(4, WORDS, (1, LENGTH)), torch.randn(1, 7, WIDTH)
    for patch in range(7):
        changed = patches.clone()
        changed[0, patch] += torch.randn(WIDTH)
        difference = logits(captioner, patches, ids) - logits(captioner, changed, ids)
        assert (difference.abs().amax(dim=-1) > 1e-4).all()


def test_a_word_does_not_depend_on_how_many_come_after_it(captioner):
    open_gates(captioner)
    ids, patches = torch.randint(4, WORDS, (1, LENGTH)), torch.randn(1, 7, WIDTH)
    whole = logits(captioner, patches, ids)
    for length in range(1, LENGTH):
        assert torch.allclose(logits(captioner, patches, ids[:, :length]), whole[:, :length], atol=1e-5)


def test_the_loss_is_the_mean_over_the_words_and_the_end(captioner):
    open_gates(captioner)
    ids, patches = torch.tensor([[START, 5, 6, END, PAD], [START, 7, 8, 9, END]]), torch.randn(2, 7, WIDTH)
    probabilities = logits(captioner, patches, ids).log_softmax(dim=-1)
    # The padding after an end does not change what comes before it.
    wanted = [-probabilities[row, place - 1, ids[row, place]] for row in (0, 1) for place in range(1, 4 + row)]
    assert captioner(patches, ids).item() == pytest.approx(torch.stack(wanted).mean().item(), abs=1e-5)


def continued(captioner: Captioner, patches: Tensor, ids: Tensor) -> Tensor:
    """The log-probabilities of the next word, of what may be written."""
    scores = logits(captioner, patches, ids)[0, -1].log_softmax(dim=-1)
    scores[[PAD, START, UNKNOWN]] = -math.inf
    return scores


def greedy(captioner: Captioner, patches: Tensor) -> list[int]:
    ids = [START]
    while ids[-1] != END and len(ids) <= LENGTH + 1:
        ids.append(int(continued(captioner, patches, torch.tensor([ids])).argmax()))
    return ids


def written(ids: Tensor) -> list[int]:
    """Up to the end, without padding."""
    row = [number for number in ids.tolist() if number != PAD]
    return row[: row.index(END) + 1] if END in row else row


def test_greedy_search_equals_a_slow_loop_image_by_image(captioner):
    open_gates(captioner)
    patches = torch.randn(6, 7, WIDTH)
    found = captioner.generate(patches)
    expected = [greedy(captioner, patches[image : image + 1]) for image in range(6)]
    assert [written(row) for row in found] == expected
    assert len({tuple(row) for row in expected}) > 1


def test_beams_find_captions_that_are_at_least_as_likely(captioner):
    open_gates(captioner)
    patches = torch.randn(6, 7, WIDTH)

    def likelihood(image: int, ids: list[int]) -> float:
        """The mean log-probability of a word, by which beams are ranked."""
        one = patches[image : image + 1]
        steps = [continued(captioner, one, torch.tensor([ids[:end]]))[ids[end]].item() for end in range(1, len(ids))]
        return sum(steps) / len(steps)

    by_beams = [written(row) for row in captioner.generate(patches, beams=4)]
    by_greed = [written(row) for row in captioner.generate(patches)]
    gains = [likelihood(image, by_beams[image]) - likelihood(image, by_greed[image]) for image in range(6)]
    assert sum(gains) > 0
    assert sum(gain > -1e-4 for gain in gains) >= 5  # a greedy caption can drop out of the beams


def slow_cider(generated: list[str], references: list[list[str]]) -> float:
    """Vedantam et al., arXiv 1411.5726, equations 1 to 3, in the form CIDEr-D: clipped, with a penalty of length."""

    def grams(text: str, size: int) -> Counter:
        words = text.split()
        return Counter(tuple(words[start : start + size]) for start in range(len(words) - size + 1))

    total = 0.0
    for size in (1, 2, 3, 4):
        holding: Counter = Counter()
        for captions in references:
            holding.update({gram for text in captions for gram in grams(text, size)})

        def weights(text: str, size: int = size, holding: Counter = holding) -> dict[tuple, float]:
            rarity = {gram: math.log(len(references) / max(1, holding[gram])) for gram in grams(text, size)}
            return {gram: count * rarity[gram] for gram, count in grams(text, size).items()}

        for text, captions in zip(generated, references, strict=True):
            for true in captions:
                ours, theirs = weights(text), weights(true)
                norm = math.hypot(*ours.values()) * math.hypot(*theirs.values())
                shared = sum(min(weight, theirs.get(gram, 0)) * theirs.get(gram, 0) for gram, weight in ours.items())
                # The lengths are counted in pairs of words.
                apart = sum(grams(text, 2).values()) - sum(grams(true, 2).values())
                total += shared / norm * math.exp(-(apart**2) / 72) / len(captions) if norm else 0
    return 10 * total / 4 / len(generated)


def test_cider_equals_a_slow_reference():
    references = [
        ["a red seven is left of a star", "a star with a red seven"],
        ["a blue circle over a green heart"],
        ["two dogs on a sofa near a red lamp", "dogs rest on a sofa"],
    ]
    generated = ["a red seven over a star", "a green heart under a blue circle", "a dog on a red sofa"]
    assert cider(generated, references) == pytest.approx(slow_cider(generated, references), rel=1e-6)


def test_cider_is_highest_for_the_true_captions_however_they_are_written():
    captions = [caption(colour) for colour in SQUARES]
    references = [[text] for text in captions]
    assert cider([f"{text.capitalize()}." for text in captions], references) == pytest.approx(CIDER_MAXIMUM)


def test_cider_of_one_image_is_refused():
    with pytest.raises(ValueError, match=r"CIDEr is asked of 1 image; expected two or more"):
        cider(["a dog"], [["a dog"]])


def test_scores_also_say_what_the_captions_of_other_images_would_get():
    references = [["a red seven is here"], ["the blue star stands there"]]
    scores = caption_scores([text for (text,) in references], references, {"red", "star", "dog"})
    assert scores["CIDEr"] == pytest.approx(CIDER_MAXIMUM)
    assert scores["CIDEr of other images"] == 0
    assert scores["K-Precision"] == scores["K-Precision, nouns and adjectives"] == 1
    assert caption_scores(["a cat", "the"], references, {"dog"})["K-Precision, nouns and adjectives"] is None
    assert "K-Precision, nouns and adjectives" not in caption_scores(["a cat", "the"], references)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return write_untrained(tmp_path_factory.mktemp("model") / "untrained")


@pytest.mark.slow
class TestCommand:
    def flags(self, model, path, *further) -> list[str]:
        data = ["--train-data", str(path), "--test-data", str(path)]
        return ["--model", model, *data, "--workers", "0", "--device", "cpu", *further]

    def test_easy_scenes_are_learnt_by_heart(self, model, tmp_path):
        path = write_scenes(tmp_path)
        words = tmp_path / "words.txt"
        words.write_text("Red\ngreen\nblue\nyellow\nwhite\npurple\n", encoding="utf-8")
        further = ["--steps", "150", "--lr", "5e-3", "--batch-size", "6", "--nouns-and-adjectives", str(words)]
        measures = main(self.flags(model, path, *further))
        for name in ("greedy", "beams"):
            assert measures[f"CIDEr, {name}"] == pytest.approx(CIDER_MAXIMUM)
            assert measures[f"CIDEr of other images, {name}"] < CIDER_MAXIMUM / 2
            assert measures[f"K-Precision, {name}"] == pytest.approx(1)
            assert measures[f"K-Precision, nouns and adjectives, {name}"] == pytest.approx(1)
        assert (measures["images"], measures["captions"]) == (6, 6)

    def test_the_backbone_stays_frozen(self, model, tmp_path, monkeypatch):
        from examples.captioning import command

        found = []

        def load(args, load=command.load_backbone):
            backbone = load(args)
            found.append((backbone.model, {name: each.clone() for name, each in backbone.model.state_dict().items()}))
            return backbone

        monkeypatch.setattr(command, "load_backbone", load)
        main(self.flags(model, write_scenes(tmp_path), "--steps", "3"))
        ((backbone, before),) = found
        assert not backbone.training
        assert all(torch.equal(each, before[name]) for name, each in backbone.state_dict().items())

    def test_one_test_image_is_refused_before_training(self, model, tmp_path, capsys):
        with pytest.raises(SystemExit) as stopped:
            main(self.flags(model, write_scenes(tmp_path, ("red",)), "--steps", "1000000"))
        assert stopped.value.code == 2
        assert "pairs.csv has 1 image; expected two or more, which CIDEr compares" in capsys.readouterr().err

    def test_a_word_list_that_cannot_be_read_is_one_line_of_error(self, model, tmp_path, capsys):
        flags = self.flags(model, write_scenes(tmp_path), "--nouns-and-adjectives", str(tmp_path / "none.txt"))
        with pytest.raises(SystemExit) as stopped:
            main(flags)
        assert stopped.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert "none.txt cannot be read" in line
