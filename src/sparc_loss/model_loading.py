"""The loader of models for `sparc-loss evaluate` and `sparc-loss show`: any model that open_clip trains.

open_clip writes checkpoints to RUN/checkpoints/ and the arguments of the run to RUN/params.txt. Settings that the
command does not give are read from there, so that a model is opened with the settings it was trained with.
"""

import ast
import difflib
import inspect
import logging
import pickle
import sys
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

_MODEL_TYPES: dict[str, type | tuple[type, ...]] = {
    "model": str,
    "siglip": bool,
    "force_quick_gelu": bool,
    "force_custom_text": bool,
    "force_naflex_vision": bool,
    "force_image_size": (int, list, tuple),
    "force_context_length": int,
    "image_mean": (list, tuple),
    "image_std": (list, tuple),
    "image_interpolation": str,
    "image_resize_mode": str,
}
MODEL_SETTINGS = tuple(_MODEL_TYPES)
"""The arguments of open_clip_train that define the model, its tokenizer and its preprocessing for evaluation."""


def add_model_flags(parser: ArgumentParser) -> None:
    """Add the flags that select the model; `complete_from_run` and `load_model` read them."""
    add = parser.add_argument
    add(
        "--model",
        metavar="NAME",
        help="a model of open_clip, local-dir:FOLDER or hf-hub:NAME (default: that of the checkpoint's run)",
    )
    add("--pretrained", metavar="TAG|FILE", help="a tag of open_clip, or a checkpoint of any training with it")
    add = parser.add_argument_group(
        "As in the training of the model",
        "Default: as in params.txt of the run, where the checkpoint lies in RUN/checkpoints/, else as open_clip's.",
    ).add_argument
    add("--siglip", action=BooleanOptionalAction, help="the model has a logit bias")
    add("--force-quick-gelu", action=BooleanOptionalAction)
    add("--force-custom-text", action=BooleanOptionalAction)
    add("--force-naflex-vision", action=BooleanOptionalAction, help="open_clip 4")
    add("--force-image-size", type=int, nargs="+", metavar="N")
    add("--force-context-length", type=int, metavar="N")
    add("--image-mean", type=float, nargs="+", metavar="X")
    add("--image-std", type=float, nargs="+", metavar="X")
    add("--image-interpolation", choices=("bicubic", "bilinear", "random"))
    add("--image-resize-mode", choices=("shortest", "longest", "squash"))
    add("--cache-dir", metavar="FOLDER", help="for what open_clip downloads")


def complete_from_run(prog: str, args: Namespace, further: tuple[str, ...] = ()) -> None:
    """Set arguments that are None to the values of the checkpoint's run, and print a warning if others differ.

    QuickGELU has no parameter, so weights also load without it, and every figure is wrong. It is set where a tag's
    weights want it; a checkpoint that was trained with another activation is refused.

    Args:
        prog: begins every line on stderr.
        args: of a parser with `add_model_flags`; changed in place.
        further: names of further arguments of the training, beyond MODEL_SETTINGS.

    Raises:
        ValueError: neither the command nor a run names the model; a model whose activation is not the checkpoint's.
        ImportError: without open_clip.
    """
    insisted = args.force_quick_gelu is not None
    path = _params_file(args.pretrained)
    trained = _read_params(prog, path) if path is not None else {}
    for name in (*MODEL_SETTINGS, *further):
        if name not in trained or not hasattr(args, name):
            continue
        given, found = getattr(args, name), trained[name]
        if given is None:
            setattr(args, name, found)
        elif _comparable(given) != _comparable(found):
            flag = f"--{name.replace('_', '-')}"
            print(f"{prog}: warning: {flag} is {given}, {path} has {found}; the command's is taken", file=sys.stderr)
    if args.model is None:
        raise ValueError(
            "argument --model: not given, and --pretrained is no checkpoint of a run with params.txt; expected one of "
            "open_clip.list_models(), local-dir:FOLDER or hf-hub:ORGANISATION/NAME"
        )
    if not args.model.startswith(("local-dir:", "hf-hub:")):
        args.model = args.model.replace("/", "-")  # ViT-B/32, as open_clip takes it
        _settle_quick_gelu(prog, args, path, trained, insisted)


def load_model(args: Namespace) -> "tuple[nn.Module, Callable[[Any], Tensor], Any]":
    """The model of `--model` and `--pretrained` with its preprocessing of evaluation and its tokenizer.

    `open_clip.create_model` ignores `--pretrained` with a local-dir: or hf-hub: model, and starts from random weights
    if it finds none. This function uses `--pretrained` and raises an error if there are no weights.

    Args:
        args: of a parser with `add_model_flags`, completed; with `precision` and `device`.

    Raises:
        ValueError: a model or weights that open_clip cannot load.
        ImportError: without open_clip.
    """
    import open_clip

    _check_device(args.device)
    described = args.model.startswith(("local-dir:", "hf-hub:"))
    if not described and args.model not in open_clip.list_models():
        nearest = difflib.get_close_matches(args.model, open_clip.list_models(), n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(
            f"argument --model: {args.model!r} is no model of open_clip; expected one of open_clip.list_models(), "
            f"local-dir:FOLDER or hf-hub:ORGANISATION/NAME{hint}"
        )
    if not described and not args.pretrained:
        tags = open_clip.list_pretrained_tags_by_model(args.model)
        raise ValueError(
            f"argument --pretrained: not given, and {args.model} has no default weights; expected "
            f"{', '.join([*tags, 'or a checkpoint'])}"
        )
    checkpoint = args.pretrained if args.pretrained and _is_file(args.pretrained) else None
    if described and args.pretrained and checkpoint is None:
        problem = "is a folder, such as a sharded checkpoint" if Path(args.pretrained).is_dir() else "is no file"
        raise ValueError(f"argument --pretrained: {args.pretrained!r} {problem}; expected a file of weights")
    try:
        if checkpoint is None:
            model = open_clip.create_model(
                args.model, args.pretrained, require_pretrained=True, **_options(args, None)
            )
        else:
            state_dict = _read_state_dict(checkpoint)
            logging.disable(logging.WARNING)  # the warning that no weights were found; they are loaded next
            try:
                options = {"load_weights": False, "pretrained_text": False, **_options(args, state_dict)}
                model = open_clip.create_model(args.model, **options)
            finally:
                logging.disable(logging.NOTSET)
            _load(model, checkpoint, state_dict)
        tokenizer = open_clip.get_tokenizer(
            args.model, context_length=args.force_context_length, cache_dir=args.cache_dir
        )
    except Exception as error:  # open_clip, torch, safetensors and the hub each raise their own
        what = f"{args.model} with {args.pretrained}" if args.pretrained else args.model
        raise ValueError(f"{what} cannot be loaded: {why_not_loaded(args.pretrained, error)}") from error
    return model, preprocessing_of(model), tokenizer


def preprocessing_of(model: Any, **changes: Any) -> "Callable[[Any], Tensor]":
    """The preprocessing for evaluation that open_clip stores in a model, with some of its settings changed."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    transform: Callable[[Any], Tensor] = image_transform_v2(
        PreprocessCfg(**{**model.visual.preprocess_cfg, **changes}), is_train=False
    )
    return transform


def why_not_loaded(path: str | Path | None, error: Exception) -> str:
    """The reason in one line; for a file with Python objects, which torch refuses to load, also the remedy."""
    if (
        isinstance(error, pickle.UnpicklingError)
        and "eights only load failed" in str(error)
        and _is_written_by_torch(path)
    ):
        converted = f"{path}.weights"
        return (
            "it holds Python objects beside tensors, as checkpoints of older versions do, and loading these could run "
            'any code. If you trust the file, save its weights alone and give that file: python -c "import torch; '
            f"c = torch.load('{path}', map_location='cpu', weights_only=False); "
            f"torch.save({{'state_dict': c['state_dict']}}, '{converted}')\""
        )
    reason = " ".join(str(error).split())
    return f"{type(error).__name__}: {reason if len(reason) <= 300 else reason[:297] + '...'}"


def _is_written_by_torch(path: str | Path | None) -> bool:
    """Whether a file begins as those of `torch.save`: a zip, or a pickle of protocol 2."""
    try:
        with open(path or "", "rb") as file:
            return file.read(2) in (b"PK", b"\x80\x02")
    except OSError:
        return False


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except Exception as error:  # torch raises several kinds
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"argument --device: {device!r} cannot be used ({reason}); expected one that torch has, such as cpu"
        ) from error


def _settle_quick_gelu(prog: str, args: Namespace, path: Path | None, trained: dict[str, Any], insisted: bool) -> None:
    import open_clip

    if not args.pretrained or args.model not in open_clip.list_models():
        return  # `load_model` refuses it
    own = bool(args.force_quick_gelu) or _has_quick_gelu(args.model)
    activation = "QuickGELU" if own else "GELU"
    if not _is_file(args.pretrained):
        tag = open_clip.get_pretrained_cfg(args.model, args.pretrained)
        if tag and bool(tag.get("quick_gelu")) != own:
            if own or insisted:
                text = f"warning: the weights {args.pretrained!r} were not trained with {activation}, which is taken"
            else:
                args.force_quick_gelu = True
                text = f"{args.model} has GELU, and the weights {args.pretrained!r} want QuickGELU, which is taken"
            print(f"{prog}: {text}", file=sys.stderr)
    elif path is None:
        print(
            f"{prog}: {args.pretrained} has no params.txt of its run: whether it was trained with QuickGELU, and with "
            f"which image size and normalisation, cannot be known; those of {args.model} are taken",
            file=sys.stderr,
        )
    elif trained.get("model"):
        name = trained["model"].replace("/", "-")
        trained_with = bool(trained.get("force_quick_gelu")) or _has_quick_gelu(name)
        if trained_with != own and not insisted:
            raise ValueError(
                f"argument --model: {args.model} has {activation}, and {path} says that the checkpoint was trained "
                f"as {name} with {'QuickGELU' if trained_with else 'GELU'}: every figure would be wrong; leave "
                f"--model out, or give --{'no-' * (not own)}force-quick-gelu to insist"
            )
        tag = open_clip.get_pretrained_cfg(name, str(trained.get("pretrained")))
        if tag and tag.get("quick_gelu") and not own and not insisted:
            print(
                f"{prog}: warning: the checkpoint was trained from {trained['pretrained']!r}, which has QuickGELU, as "
                f"{name}; open_clip 2.29 and later trained it with GELU, which is taken; if an earlier one did, give "
                "--force-quick-gelu",
                file=sys.stderr,
            )


def _has_quick_gelu(model: str) -> bool:
    import open_clip

    return bool((open_clip.get_model_config(model) or {}).get("quick_gelu"))


def _params_file(pretrained: str | None) -> Path | None:
    if not pretrained or not _is_file(pretrained):
        return None
    path = Path(pretrained).resolve().parent.parent / "params.txt"
    return path if path.is_file() else None


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except OSError:  # a tag that is too long for a file's name
        return False


def _read_params(prog: str, path: Path) -> dict[str, Any]:
    """The arguments of a run, `name: value` in each line (open_clip_train/main.py)."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        print(f"{prog}: warning: {path} cannot be read ({error}); the command's settings are taken", file=sys.stderr)
        return {}
    params: dict[str, Any] = {}
    for line in lines:
        name, separator, text = line.partition(": ")
        if not separator:
            continue
        try:
            params[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            params[name] = text
    for old, new in _RENAMED.items():
        if old in params:
            params.setdefault(new, params.pop(old))
    wrong = {name: params[name] for name in _TYPES if not isinstance(params.get(name), (_TYPES[name], type(None)))}
    for name, value in wrong.items():
        print(f"{prog}: warning: {path} has {name}: {value!r}, which is left out", file=sys.stderr)
        del params[name]
    return params


# Names in the params.txt of runs with older releases.
_RENAMED = {"sparc_scale": "sparc_fine_grained_scale"}

_TYPES: dict[str, type | tuple[type, ...]] = {
    **_MODEL_TYPES,
    "sparc_threshold": (int, float),
    "sparc_alignment": str,
    "sparc_fine_grained_scale": (int, float),
    "sparc_tokens": str,
}


def _comparable(value: Any) -> Any:
    """[224] and 224, [1, 2] and (1, 2), None and False are the same setting."""
    if isinstance(value, (list, tuple)):
        return value[0] if len(value) == 1 else tuple(value)
    return False if value is None else value


def _options(args: Namespace, state_dict: "dict[str, Tensor] | None") -> dict[str, Any]:
    """Keyword arguments of `open_clip.create_model`, as open_clip_train makes them of its flags."""
    import open_clip

    size = args.force_image_size
    given = {
        "mean": args.image_mean,
        "std": args.image_std,
        "interpolation": args.image_interpolation,
        "resize_mode": args.image_resize_mode,
    }
    options = {
        "precision": args.precision,
        "device": args.device,
        "force_quick_gelu": bool(args.force_quick_gelu),
        # The names of the weights show whether the text tower is a module of its own.
        "force_custom_text": bool(args.force_custom_text)
        or (state_dict is not None and any(name.startswith("text.") for name in state_dict)),
        # One number is a square, as open_clip_train takes it.
        "force_image_size": size[0] if isinstance(size, (list, tuple)) and len(size) == 1 else size,
        "force_context_length": args.force_context_length,
        "force_preprocess_cfg": {name: value for name, value in given.items() if value is not None},
        "cache_dir": args.cache_dir,
    }
    if "force_naflex_vision" in inspect.signature(open_clip.create_model).parameters:  # open_clip 4
        options["force_naflex_vision"] = bool(args.force_naflex_vision)
    if args.siglip or (state_dict is not None and "logit_bias" in state_dict):
        options["init_logit_bias"] = -10.0  # the parameter exists; its value comes with the weights
    return options


def _read_state_dict(path: str) -> "dict[str, Tensor] | None":
    """The weights by name, without the prefixes of wrappers; None for formats that open_clip converts."""
    from open_clip.factory import load_state_dict

    if Path(path).suffix in (".npz", ".npy"):
        return None
    state_dict = load_state_dict(path)
    if not isinstance(state_dict, dict):
        raise ValueError(f"it holds a {type(state_dict).__name__}; expected weights by name")
    for prefix in ("module.", "_orig_mod."):  # of DistributedDataParallel and torch.compile
        if state_dict and all(name.startswith(prefix) for name in state_dict):
            state_dict = {name.removeprefix(prefix): value for name, value in state_dict.items()}
    return state_dict


def _load(model: "nn.Module", path: str, state_dict: "dict[str, Tensor] | None") -> None:
    """`open_clip.load_checkpoint` with weights that have already been read."""
    from unittest.mock import patch

    import open_clip
    from open_clip import factory

    if state_dict is None:
        open_clip.load_checkpoint(model, path)
        return
    # It takes only a path, and converts and resizes the weights that it reads.
    with patch.object(factory, "load_state_dict", lambda *given, **named: state_dict):
        factory.load_checkpoint(model, path)
