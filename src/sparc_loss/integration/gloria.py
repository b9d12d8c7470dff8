"""The plug-in `--loss gloria`. The three functions are the contract of `sparc_loss.integration.plugin`."""

from argparse import ArgumentParser, Namespace

from torch import nn

from sparc_loss.integration.shared import (
    add_group_with_weights,
    add_scale_and_tokens,
    check_flags,
    launched,
    number,
    shared_settings,
    surfaced,
)
from sparc_loss.losses import GloriaLoss


def add_arguments(parser: ArgumentParser) -> None:
    """Add the `--gloria-*` flags in a group of their own."""
    group = add_group_with_weights(
        parser, "gloria", "GLoRIA", "Attention of tokens to patches, matched by a soft maximum.", global_weight=1.0
    )
    group.add_argument(
        "--gloria-matching-scale",
        type=number(minimum=0, exclusive=True),
        default=5.0,
        metavar="X",
        help="1/temperature of the soft maximum over tokens (default: %(default)s)",
    )
    add_scale_and_tokens(group, "gloria")


def check_args(args: Namespace) -> None:
    """Refuse what cannot be trained before anything is written; see `sparc_loss.integration.shared.check_flags`."""
    check_flags(args, "gloria")


def prepare_model(model: nn.Module, args: Namespace) -> nn.Module:
    """Surface the model's patch and token embeddings; turn on what exact gradients over several processes need."""
    if not launched():
        check_args(args)
    return surfaced(model, args, "gloria")


def create_loss(args: Namespace) -> GloriaLoss:
    """GloriaLoss around the loss that open_clip makes from the same flags."""
    return GloriaLoss(matching_scale=args.gloria_matching_scale, **shared_settings(args, "gloria"))
