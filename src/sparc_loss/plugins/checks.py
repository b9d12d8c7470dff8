"""What our objectives cannot train, refused from the flags before open_clip_train creates the run's folder."""

import logging
from argparse import Namespace

import open_clip
import torch
from open_clip_train import main as open_clip_main
from torch import nn

from sparc_loss.embeddings.surface import check_model

logger = logging.getLogger(__name__)

try:
    from open_clip.naflex_config import NaFlexDataConfig
except ImportError:  # open_clip before 4
    NaFlexDataConfig = None

_REFUSED = {
    "torchscript": "a TorchScript model cannot return patch and token embeddings",
    "trace": "a traced model cannot return patch and token embeddings, and cannot be trained",
    "horovod": "the loss reduces over torch.distributed",
}


def launched() -> bool:
    """Whether the launcher started this training and has called `check_args` before the run's folder was made."""
    return hasattr(open_clip_main.parse_args, "__wrapped__")


def check_flags(args: Namespace, name: str) -> None:
    """Refuse what none of our losses can train, as far as the flags show it.

    Raises:
        ValueError: a flag of open_clip with which none of our losses works, or --accum-freq where the number of
            patches or of text tokens differs between batches.
        TypeError: a model or tokenizer that cannot be surfaced.
    """
    for flag in ("torchscript", "trace", "horovod"):
        if getattr(args, flag, False):
            raise ValueError(f"--{flag} is set; expected it off with --loss {name}: {_REFUSED[flag]}")
    model = model_without_weights(args)
    if model is not None:
        check_model(model)
        check_accumulation(model, args, name)


def check_accumulation(model: nn.Module, args: Namespace, name: str) -> None:
    """Raise ValueError if --accum-freq is above 1 and the number of patches or tokens differs between batches."""
    varying = _varying_sizes(model, args)
    if varying and args.accum_freq > 1:
        raise ValueError(
            f"--accum-freq is {args.accum_freq} with {varying}; expected 1 with --loss {name}: open_clip concatenates "
            "the model's outputs of the accumulated batches, and their numbers of patches and tokens differ"
        )


def _varying_sizes(model: nn.Module, args: Namespace) -> str | None:
    """The feature of open_clip 4 with which the number of patches or of text tokens differs between batches."""
    if getattr(args, "use_naflex", False) and len(set(args.naflex_seq_lens or NaFlexDataConfig.train_seq_lens)) > 1:
        return "--use-naflex and several --naflex-seq-lens"
    # open_clip_train sets args.variable_text from the model, later than this.
    if getattr(args, "variable_text", False) or getattr(getattr(model, "text", None), "variable_text", False):
        return "captions of variable length"
    return None


def model_without_weights(args: Namespace) -> nn.Module | None:
    """The model that open_clip_train will create, on the meta device; None if open_clip cannot create it there.

    In that case open_clip gives the reason when it creates the model itself.
    """
    logging.disable(logging.WARNING)  # the warning that no weights are loaded
    try:
        with torch.device("meta"):
            model: nn.Module = open_clip.create_model(
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
            return model
    except Exception as error:
        logger.debug("", exc_info=error)
        return None
    finally:
        logging.disable(logging.NOTSET)
