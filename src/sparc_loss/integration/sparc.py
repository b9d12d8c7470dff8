"""Our plug-in: `--loss sparc`. The three functions are the contract of `sparc_loss.integration.plugin`."""

from argparse import ArgumentParser, Namespace

from torch import nn

from sparc_loss.functional import ALIGNMENTS, REDUCTIONS
from sparc_loss.integration.shared import (
    add_group_with_weights,
    add_scale_and_tokens,
    number,
    shared_settings,
    surfaced,
)
from sparc_loss.losses import SparcLoss


def add_arguments(parser: ArgumentParser) -> None:
    """Add the `--sparc-*` flags in a group of their own."""
    group = add_group_with_weights(
        parser,
        "sparc",
        "SPARC",
        "Fine-grained alignment of patches and tokens within each pair (arXiv 2401.09865).",
        global_weight=0.5,
    )
    group.add_argument(
        "--sparc-threshold",
        type=number(minimum=0, maximum=1),
        default=None,
        metavar="X",
        help="sigma, below which a normalised similarity is dropped (default: 1 / number of patches)",
    )
    group.add_argument(
        "--sparc-alignment",
        choices=ALIGNMENTS,
        default="sparse",
        help="the paper's sparse weights, or its ablations (default: %(default)s)",
    )
    group.add_argument(
        "--sparc-reduction",
        choices=REDUCTIONS,
        default="token",
        help="mean over all tokens of the batch (Listing 1), or per caption and then over captions (Eq. 6) "
        "(default: %(default)s)",
    )
    add_scale_and_tokens(group, "sparc")


def prepare_model(model: nn.Module, args: Namespace) -> nn.Module:
    """Surface the model's patch and token embeddings; turn on what exact gradients over several processes need."""
    return surfaced(model, args, "sparc")


def create_loss(args: Namespace) -> SparcLoss:
    """SparcLoss around the loss that open_clip makes from the same flags (--siglip, --distill, a CoCa model)."""
    return SparcLoss(
        threshold=args.sparc_threshold,
        alignment=args.sparc_alignment,
        reduction=args.sparc_reduction,
        **shared_settings(args, "sparc"),
    )
