"""Our plug-in: `--loss sparc`. The three functions are the contract of `sparc_loss.integration.plugin`."""

import logging
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable

import open_clip
from torch import nn

from sparc_loss.embeddings import surface_embeddings
from sparc_loss.embeddings.token_mask import TOKENS
from sparc_loss.functional import ALIGNMENTS, REDUCTIONS
from sparc_loss.losses import SparcLoss


def add_arguments(parser: ArgumentParser) -> None:
    """Add the `--sparc-*` flags in a group of their own."""
    group = parser.add_argument_group(
        "SPARC", "Fine-grained alignment of patches and tokens within each pair (arXiv 2401.09865)."
    )
    group.add_argument(
        "--sparc-global-weight",
        type=_number(minimum=0),
        default=0.5,
        metavar="X",
        help="lambda_g, weight of open_clip's own contrastive loss (default: %(default)s)",
    )
    group.add_argument(
        "--sparc-fine-grained-weight",
        type=_number(minimum=0),
        default=1.0,
        metavar="X",
        help="lambda_f, weight of the fine-grained loss (default: %(default)s)",
    )
    group.add_argument(
        "--sparc-threshold",
        type=_number(minimum=0, maximum=1),
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
    group.add_argument(
        "--sparc-scale",
        type=_number(minimum=0, exclusive=True),
        default=None,
        metavar="X",
        help="fixed 1/temperature of the fine-grained loss (default: the model's learned logit_scale)",
    )
    group.add_argument(
        "--sparc-tokens",
        choices=TOKENS,
        default="words",
        help="positions that count: words, or all but padding (default: %(default)s)",
    )


def prepare_model(model: nn.Module, args: Namespace) -> nn.Module:
    """Surface the model's patch and token embeddings; turn on what exact gradients over several processes need."""
    for flag in ("torchscript", "trace", "horovod"):
        if getattr(args, flag, False):
            raise ValueError(f"--{flag} is set; expected it off with --loss sparc: {_REFUSED[flag]}")
    if args.world_size > 1 and not (args.local_loss and args.gather_with_grad):
        args.local_loss = args.gather_with_grad = True
        if args.rank == 0:
            logging.info(
                f"--loss sparc: {args.world_size} processes, turning on --local-loss --gather-with-grad, with which "
                "gradients equal those of one process on the whole batch."
            )
    tokenizer = open_clip.get_tokenizer(args.model, cache_dir=args.cache_dir, context_length=args.force_context_length)
    return surface_embeddings(model, tokenizer, tokens=args.sparc_tokens)


def create_loss(args: Namespace) -> SparcLoss:
    """SparcLoss around the loss that open_clip makes from the same flags (--siglip, --distill, a CoCa model)."""
    return SparcLoss(
        global_weight=args.sparc_global_weight,
        fine_grained_weight=args.sparc_fine_grained_weight,
        threshold=args.sparc_threshold,
        alignment=args.sparc_alignment,
        reduction=args.sparc_reduction,
        fine_grained_scale=args.sparc_scale,
        global_loss=open_clip.create_loss(args),
        local_loss=args.local_loss,
        gather_with_grad=args.gather_with_grad,
        rank=args.rank,
        world_size=args.world_size,
    )


_REFUSED = {
    "torchscript": "a TorchScript model cannot return patch and token embeddings",
    "trace": "a traced model cannot return patch and token embeddings, nor be trained",
    "horovod": "the loss reduces over torch.distributed",
}


def _number(minimum: float, maximum: float = float("inf"), exclusive: bool = False) -> Callable[[str], float]:
    expected = f"above {minimum}" if exclusive else f"of at least {minimum}"
    if maximum != float("inf"):
        expected = f"between {minimum} and {maximum}"

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not minimum <= value <= maximum or (exclusive and value == minimum):
            raise ArgumentTypeError(f"{text!r} given; expected a number {expected}")
        return value

    return number
