"""Captions by any frozen open_clip model: train a small decoder on a CSV, measure its captions of another.

The decoder attends to the patch embeddings. CIDEr says how near its captions are to those of the image, K-Precision
how many of their words are confirmed by one of these.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from tqdm import tqdm

from sparc_loss.evaluation.dataset import EvaluationData, read_data, read_lines
from sparc_loss.evaluation.faithfulness import caption_words
from sparc_loss.evaluation.image_batches import image_batches

from ..downstream.backbone import Backbone, load_backbone
from ..downstream.command import Measures, make_parser, run_command, training_settings
from .decoder import Captioner
from .scores import caption_scores
from .training import train_captioner
from .vocabulary import Vocabulary

BEAMS = {"greedy": 1, "beams": 3}  # as Flamingo has


def main(argv: Sequence[str] | None = None) -> Measures:
    """Train, measure, print the figures and write them; returns them."""
    return run_command(make_captioning_parser(), argv, _caption)


def make_captioning_parser() -> ArgumentParser:
    """The flags."""
    parser = make_parser("python -m examples.captioning", __doc__, steps=500, learning_rate=2e-3)
    parser.add_argument(
        "--nouns-and-adjectives", metavar="FILE.txt", help="words, one per line: also K-Precision of these alone"
    )
    return parser


def _caption(args: Namespace) -> Measures:
    words = {word.lower() for word in read_lines(args.nouns_and_adjectives)} if args.nouns_and_adjectives else None
    train, test = read_data(args.train_data, columns=()), read_data(args.test_data, columns=())
    if len(test.images) < 2:
        raise ValueError(f"{args.test_data} has {len(test.images)} image; expected two or more, which CIDEr compares")
    for path, data in ((args.train_data, train), (args.test_data, test)):
        if not any(caption_words(caption) for caption in data.captions):
            raise ValueError(f"{path} has no caption with a word; expected some")
    references = [[test.captions[caption] for caption in captions] for captions in test.captions_of()]
    backbone = load_backbone(args)
    captioner, vocabulary = train_captioner(backbone, train, **training_settings(args))
    measures: Measures = {}
    for name, captions in write_captions(backbone, captioner, vocabulary, test, args.batch_size, args.workers).items():
        scores = caption_scores(captions, references, words)
        measures |= {f"{measure}, {name}": score for measure, score in scores.items()}
        tqdm.write(f"{name}, {test.images[0]}: {captions[0]}")
    return {**measures, "images": len(test.images), "captions": len(test.captions)}


def write_captions(
    backbone: Backbone,
    captioner: Captioner,
    vocabulary: Vocabulary,
    data: EvaluationData,
    batch_size: int,
    workers: int,
) -> dict[str, list[str]]:
    """A caption per image by each search of BEAMS, in the order of the images."""
    written = {name: [""] * len(data.images) for name in BEAMS}
    for batch in image_batches(backbone.model, data.images, batch_size, workers, own=False):
        assert batch.whole is not None
        patches = backbone.patches(batch.whole)
        for name, beams in BEAMS.items():
            texts = vocabulary.decode(captioner.generate(patches, beams))
            for index, text in zip(batch.indices, texts, strict=True):
                written[name][index] = text
    return written
