"""Open-vocabulary detection by any open_clip model: train OWL-ViT's heads on a CSV with boxes, measure mAP on another.

The phrases of the column `boxes` are the names of the classes. Names that have no box in the training data are
measured apart. The backbone is frozen; with --fine-tune its image tower is trained too.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from ..downstream.backbone import load_backbone
from ..downstream.command import Measures, make_parser, run_command, training_settings
from .average_precision import average_precision
from .objects import read_objects
from .training import TOWER_RATE, train_heads


def main(argv: Sequence[str] | None = None) -> Measures:
    """Train, measure, print the figures and write them; returns them."""
    return run_command(make_detection_parser(), argv, _detect)


def make_detection_parser() -> ArgumentParser:
    """The flags."""
    parser = make_parser("python -m examples.detection", __doc__, steps=500, learning_rate=2e-3)
    parser.add_argument(
        "--fine-tune",
        action="store_true",
        help=f"train the image tower too, at {TOWER_RATE} times the learning rate of the heads",
    )
    return parser


def _detect(args: Namespace) -> Measures:
    train, test = read_objects(args.train_data), read_objects(args.test_data)
    backbone = load_backbone(args)
    heads = train_heads(backbone, train, **training_settings(args), fine_tune=args.fine_tune)
    return average_precision(backbone, heads, test, train.names, args.batch_size, args.workers)
