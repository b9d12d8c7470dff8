"""The plug-in `--loss filip`. The three functions are the contract of `sparc_loss.integration.plugin`."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace

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
from sparc_loss.losses import FilipLoss


def add_arguments(parser: ArgumentParser) -> None:
    """Add the `--filip-*` flags in a group of their own."""
    group = add_group_with_weights(
        parser, "filip", "FILIP", "Late interaction of patches and tokens (arXiv 2111.07783).", global_weight=0.0
    )
    group.add_argument(
        "--filip-token-dropping",
        type=_share,
        default=0.2,
        metavar="X",
        help="share of patches and tokens left out at random in training (default: %(default)s)",
    )
    add_scale_and_tokens(group, "filip")


def check_args(args: Namespace) -> None:
    """Refuse what cannot be trained before anything is written; see `sparc_loss.integration.shared.check_flags`."""
    check_flags(args, "filip")


def prepare_model(model: nn.Module, args: Namespace) -> nn.Module:
    """Surface the model's patch and token embeddings; turn on what exact gradients over several processes need."""
    if not launched():
        check_args(args)
    return surfaced(model, args, "filip")


def create_loss(args: Namespace) -> FilipLoss:
    """FilipLoss around the loss that open_clip makes from the same flags."""
    return FilipLoss(token_dropping=args.filip_token_dropping, **shared_settings(args, "filip"))


def _share(text: str) -> float:
    share = number(minimum=0, maximum=1)(text)
    if share == 1:
        raise ArgumentTypeError(f"{text!r} given; expected a number below 1")
    return share
