"""What our plug-ins share: the flags every objective has, the surfaced model, the settings of its loss."""

import logging
from argparse import ArgumentParser, ArgumentTypeError, Namespace, _ArgumentGroup
from collections.abc import Callable
from typing import Any

import open_clip
import torch
from open_clip_train import main as open_clip_main
from torch import nn

from sparc_loss.embeddings import surface_embeddings
from sparc_loss.embeddings.surface import check_model
from sparc_loss.embeddings.token_mask import TOKENS

logger = logging.getLogger(__name__)

try:
    from open_clip.naflex_config import NaFlexDataConfig
except ImportError:  # open_clip before 4
    NaFlexDataConfig = None


def add_group_with_weights(
    parser: ArgumentParser, name: str, title: str, description: str, global_weight: float
) -> _ArgumentGroup:
    """A group for the `--NAME-*` flags, with those of the two weights; `add_scale_and_tokens` adds the last two."""
    group = parser.add_argument_group(title, description)
    group.add_argument(
        f"--{name}-global-weight",
        type=number(minimum=0),
        default=global_weight,
        metavar="X",
        help="lambda_g, weight of open_clip's own contrastive loss (default: %(default)s)",
    )
    group.add_argument(
        f"--{name}-fine-grained-weight",
        type=number(minimum=0),
        default=1.0,
        metavar="X",
        help="lambda_f, weight of the fine-grained loss (default: %(default)s)",
    )
    return group


def add_scale_and_tokens(group: _ArgumentGroup, name: str) -> None:
    """Add `--NAME-scale` and `--NAME-tokens`."""
    group.add_argument(
        f"--{name}-scale",
        type=number(minimum=0, exclusive=True),
        default=None,
        metavar="X",
        help="fixed 1/temperature of the fine-grained loss (default: the model's learned logit_scale)",
    )
    group.add_argument(
        f"--{name}-tokens",
        choices=TOKENS,
        default="words",
        help="positions that count: words, or all but padding (default: %(default)s)",
    )


def launched() -> bool:
    """Whether the launcher started this training and has called `check_args` before the run's folder was made."""
    return hasattr(open_clip_main.parse_args, "__wrapped__")


def check_flags(args: Namespace, name: str) -> None:
    """Refuse what no loss of ours can train, as far as the flags tell.

    Raises:
        ValueError: a flag of open_clip with which no loss of ours works, or --accum-freq where the number of patches
            or of text tokens changes from batch to batch.
        TypeError: a model or tokenizer that cannot be surfaced.
    """
    for flag in ("torchscript", "trace", "horovod"):
        if getattr(args, flag, False):
            raise ValueError(f"--{flag} is set; expected it off with --loss {name}: {_REFUSED[flag]}")
    model = _model_without_weights(args)
    if model is not None:
        check_model(model)
        _check_accumulation(model, args, name)


def surfaced(model: nn.Module, args: Namespace, name: str) -> nn.Module:
    """The model with patch and token embeddings; turns on what exact gradients over several processes need.

    Raises:
        ValueError: --accum-freq where the number of patches or of text tokens changes from batch to batch.
        TypeError: a model that cannot be surfaced.
    """
    _check_accumulation(model, args, name)
    if args.world_size > 1 and not (args.local_loss and args.gather_with_grad):
        args.local_loss = args.gather_with_grad = True
        if args.rank == 0:
            logging.info(
                f"--loss {name}: {args.world_size} processes, turning on --local-loss --gather-with-grad, with which "
                "gradients equal those of one process on the whole batch."
            )
    tokenizer = open_clip.get_tokenizer(args.model, cache_dir=args.cache_dir, context_length=args.force_context_length)
    return surface_embeddings(model, tokenizer, tokens=getattr(args, f"{name}_tokens"))


def shared_settings(args: Namespace, name: str) -> dict[str, Any]:
    """Keyword arguments of every objective, around the loss that open_clip makes of its flags, such as --siglip."""
    return {
        "global_weight": getattr(args, f"{name}_global_weight"),
        "fine_grained_weight": getattr(args, f"{name}_fine_grained_weight"),
        "fine_grained_scale": getattr(args, f"{name}_scale"),
        "global_loss": open_clip.create_loss(args),
        "local_loss": args.local_loss,
        "gather_with_grad": args.gather_with_grad,
        "rank": args.rank,
        "world_size": args.world_size,
    }


def _model_without_weights(args: Namespace) -> nn.Module | None:
    """The model that open_clip_train will make, on the meta device; None where open_clip cannot make it so.

    It is left to open_clip to say why, when it makes the model itself.
    """
    logging.disable(logging.WARNING)  # that no weights are loaded
    try:
        with torch.device("meta"):
            return open_clip.create_model(
                args.model,
                load_weights=False,
                pretrained_text=False,
                device="meta",
                force_quick_gelu=args.force_quick_gelu,
                force_custom_text=args.force_custom_text,
                force_patch_dropout=args.force_patch_dropout,
                force_image_size=args.force_image_size,
                cache_dir=args.cache_dir,
            )
    except Exception as error:
        logger.debug("", exc_info=error)
        return None
    finally:
        logging.disable(logging.NOTSET)


def _check_accumulation(model: nn.Module, args: Namespace, name: str) -> None:
    varying = _varying_sizes(model, args)
    if varying and args.accum_freq > 1:
        raise ValueError(
            f"--accum-freq is {args.accum_freq} with {varying}; expected 1 with --loss {name}: open_clip concatenates "
            "what the model returns for the batches that it accumulates, and patches and tokens differ in number"
        )


def _varying_sizes(model: nn.Module, args: Namespace) -> str | None:
    """What of open_clip 4 makes the number of patches or of text tokens change from batch to batch."""
    if getattr(args, "use_naflex", False) and len(set(args.naflex_seq_lens or NaFlexDataConfig.train_seq_lens)) > 1:
        return "--use-naflex and several --naflex-seq-lens"
    # open_clip_train sets args.variable_text from the model, later than this.
    if getattr(args, "variable_text", False) or getattr(getattr(model, "text", None), "variable_text", False):
        return "captions of variable length"
    return None


def number(minimum: float, maximum: float = float("inf"), exclusive: bool = False) -> Callable[[str], float]:
    """A `type` for add_argument: numbers in [minimum, maximum], without `minimum` where `exclusive`."""
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


_REFUSED = {
    "torchscript": "a TorchScript model cannot return patch and token embeddings",
    "trace": "a traced model cannot return patch and token embeddings, nor be trained",
    "horovod": "the loss reduces over torch.distributed",
}
