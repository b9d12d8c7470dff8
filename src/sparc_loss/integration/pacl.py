"""The plug-in `--loss pacl`. The three functions are the contract of `sparc_loss.integration.plugin`."""

from argparse import ArgumentParser, Namespace

from torch import nn

from sparc_loss.integration.shared import (
    add_group_with_weights,
    add_scale_and_tokens,
    check_flags,
    launched,
    shared_settings,
    surfaced,
)
from sparc_loss.losses import PaclLoss
from sparc_loss.losses.pacl import WEIGHTINGS


def add_arguments(parser: ArgumentParser) -> None:
    """Add the `--pacl-*` flags in a group of their own."""
    group = add_group_with_weights(
        parser, "pacl", "PACL", "Patches pooled for each caption (arXiv 2212.04994).", global_weight=0.0
    )
    group.add_argument(
        "--pacl-weighting",
        choices=WEIGHTINGS,
        default="cosine",
        help="of the patches, by their cosine with the caption or what is made of it (default: %(default)s)",
    )
    add_scale_and_tokens(group, "pacl")


def check_args(args: Namespace) -> None:
    """Refuse what cannot be trained before anything is written; see `sparc_loss.integration.shared.check_flags`."""
    check_flags(args, "pacl")


def prepare_model(model: nn.Module, args: Namespace) -> nn.Module:
    """Surface the model's patch and token embeddings; turn on what exact gradients over several processes need."""
    if not launched():
        check_args(args)
    return surfaced(model, args, "pacl")


def create_loss(args: Namespace) -> PaclLoss:
    """PaclLoss around the loss that open_clip makes from the same flags."""
    return PaclLoss(weighting=args.pacl_weighting, **shared_settings(args, "pacl"))
