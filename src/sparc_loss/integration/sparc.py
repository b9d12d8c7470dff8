"""Our plug-in: `--loss sparc`. The functions are the contract of `sparc_loss.integration.plugin`."""

import logging
from argparse import ArgumentParser, ArgumentTypeError, BooleanOptionalAction, Namespace
from collections.abc import Callable
from typing import Any

import open_clip
from torch import nn

from sparc_loss.functional import ALIGNMENTS, REDUCTIONS
from sparc_loss.integration import probe_every
from sparc_loss.integration.guard import training_goes_on
from sparc_loss.integration.shared import (
    add_group_with_weights,
    add_scale_and_tokens,
    check_flags,
    launched,
    number,
    shared_settings,
    surfaced,
)
from sparc_loss.integration.validation import check_launcher
from sparc_loss.integration.versions import logs_metrics
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
    group.add_argument(
        "--sparc-image-negatives",
        type=_whole_number(minimum=0),
        default=0,
        metavar="K",
        help="contrast each caption's alignment with its own image against those with K other images of the batch; "
        "not in the paper (default: off)",
    )
    group.add_argument(
        "--sparc-image-contrastive-weight",
        type=number(minimum=0),
        default=1.0,
        metavar="X",
        help="weight of that contrast (default: %(default)s)",
    )
    group.add_argument(
        "--sparc-start",
        type=_whole_number(minimum=0),
        default=0,
        metavar="N",
        help="train the global loss alone for the first N epochs, those before a --resume included (default: none)",
    )
    group.add_argument(
        "--sparc-probe-every",
        type=_whole_number(minimum=1),
        default=0,
        metavar="N",
        help="measure on validation pairs after every N epochs whether the fine-grained loss looks at the image "
        "(default: never)",
    )
    group.add_argument(
        "--sparc-show-every",
        type=_whole_number(minimum=1),
        default=0,
        metavar="N",
        help="draw what words select in a few validation pairs after every N epochs, to the run's folder and to "
        "--report-to (default: never)",
    )
    group.add_argument(
        "--sparc-metrics",
        action=BooleanOptionalAction,
        help="log fine_grained_accuracy, patches_kept and alignment_entropy of some pairs (default: with open_clip 4 "
        "and later, whose training can)",
    )


def check_args(args: Namespace) -> None:
    """Refuse what cannot be trained, measured or drawn before anything is written.

    Raises:
        ValueError: as `sparc_loss.integration.shared.check_flags`; --sparc-image-negatives that no batch has,
            --sparc-start, --sparc-probe-every or --sparc-show-every without what they need, --sparc-metrics with an
            open_clip that would add metrics to the loss.
        TypeError: a model or tokenizer that cannot be surfaced.
        ImportError: --sparc-show-every without the extra `show`.
    """
    check_flags(args, "sparc")
    pairs = args.batch_size * args.accum_freq
    if args.sparc_image_negatives >= pairs and not getattr(args, "use_naflex", False):  # NaFlex batches vary in size
        raise ValueError(
            f"--sparc-image-negatives is {args.sparc_image_negatives} with batches of {pairs} pairs on each process "
            f"(--batch-size x --accum-freq); expected at most {pairs - 1}, the other images of a batch"
        )
    if args.sparc_start:
        check_launcher("--sparc-start")
    if args.sparc_probe_every:
        probe_every.check_run(args)
    if args.sparc_show_every:
        from sparc_loss.integration.show_every import check_run

        check_run(args)
    if args.sparc_metrics and not logs_metrics(open_clip.__version__):
        raise ValueError(
            f"--sparc-metrics is set; expected it off with open_clip {open_clip.__version__}: its training takes all "
            "that a loss returns for terms of the loss, and would add them up"
        )


def prepare_model(model: nn.Module, args: Namespace) -> nn.Module:
    """Surface the model's patch and token embeddings; turn on what exact gradients over several processes need."""
    if not launched():
        check_args(args)
    return surfaced(model, args, "sparc")


def create_loss(args: Namespace) -> SparcLoss:
    """SparcLoss around the loss that open_clip makes from the same flags (--siglip, --distill, a CoCa model)."""
    return SparcLoss(
        threshold=args.sparc_threshold,
        alignment=args.sparc_alignment,
        reduction=args.sparc_reduction,
        image_negatives=args.sparc_image_negatives,
        image_contrastive_weight=args.sparc_image_contrastive_weight,
        metrics=logs_metrics(open_clip.__version__) if args.sparc_metrics is None else args.sparc_metrics,
        **shared_settings(args, "sparc"),
    )


def before_epoch(loss: SparcLoss, epoch: int, args: Namespace) -> None:
    """Leave the fine-grained terms out of the first epochs, as `--sparc-start` says."""
    begun = epoch >= args.sparc_start
    loss.fine_grained_weight = args.sparc_fine_grained_weight if begun else 0.0
    loss.image_contrastive_weight = args.sparc_image_contrastive_weight if begun else 0.0
    if args.sparc_start and args.rank == 0:
        logging.info(f"--sparc-start {args.sparc_start}: epoch {epoch} trains {loss}")


def after_epoch(model: nn.Module, data: dict[str, Any], epoch: int, args: Namespace, tb_writer: Any) -> None:
    """Probe, and draw what words select, where `--sparc-probe-every` and `--sparc-show-every` say so."""
    if args.rank != 0:
        return
    if args.sparc_probe_every and epoch % args.sparc_probe_every == 0:
        with training_goes_on(f"--sparc-probe-every after epoch {epoch}"):
            probe_every.probe_validation_pairs(model, data, epoch, args, tb_writer)
    if args.sparc_show_every and epoch % args.sparc_show_every == 0:
        with training_goes_on(f"--sparc-show-every after epoch {epoch}"):
            from sparc_loss.integration.show_every import show_validation_pairs

            show_validation_pairs(model, data, epoch, args, tb_writer)


def try_after_epoch(model: nn.Module, data: dict[str, Any], args: Namespace) -> None:
    """Probe two validation images and draw one, before an epoch is spent; report nothing."""
    if args.rank != 0:
        return
    if args.sparc_probe_every:
        with training_goes_on("--sparc-probe-every, tried before training,"):
            probe_every.measure_validation_pairs(model, args, number=2)
    if args.sparc_show_every:
        with training_goes_on("--sparc-show-every, tried before training,"):
            from sparc_loss.integration.show_every import draw_validation_pairs

            draw_validation_pairs(model, args, number=1)


def _whole_number(minimum: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise ArgumentTypeError(f"{text!r} given; expected a whole number of at least {minimum}")
        return int(text)

    return whole_number
