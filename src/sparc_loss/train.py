"""Train with stock open_clip and any loss plug-in: `python -m sparc_loss.train --loss sparc <open_clip_train flags>`.

With several processes: `torchrun --nproc_per_node 8 -- -m sparc_loss.train --loss sparc ...`.
"""

import logging
import math
import os
import pickle
import sys
import zipfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sparc_loss.model_loading import why_not_loaded
from sparc_loss.open_clip_versions import UntestedVersionError, check_version
from sparc_loss.plugins.contract import LossPlugin
from sparc_loss.plugins.discovery import (
    BUILT_IN,
    PluginError,
    find_loss,
    load_all_losses,
    load_loss,
    registered_losses,
)

if TYPE_CHECKING:
    from pandas import DataFrame

PROG = "python -m sparc_loss.train"

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """Run open_clip's training with the named loss and return its exit code (0 where it returns none).

    Raises:
        SystemExit: with code 2 and one line of error for bad arguments, a missing package or an untested open_clip.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = ArgumentParser(prog=PROG, add_help=False, allow_abbrev=False, usage=f"{PROG} [--loss NAME] ...")
    loss = _loss_of(parser, argv)  # before torch is imported, which takes seconds
    try:
        import open_clip

        warning = check_version(open_clip.__version__)
        if warning is not None:
            print(f"{PROG}: warning: {warning}", file=sys.stderr)
        from open_clip_train.params import parse_args as open_clip_parse_args

        from sparc_loss.hooks.hooked import hooked
    except ImportError as error:
        parser.error(f"open_clip's training cannot be imported ({error}); pip install 'sparc-loss[train]'")
    except UntestedVersionError as error:
        parser.error(str(error))
    plugin = _load_plugin(parser, loss)

    def parse_args(argv: list[str]) -> Namespace:
        loss_args, rest = parser.parse_known_args(argv)
        args = open_clip_parse_args(rest)
        vars(args).update(vars(loss_args))
        with _logging_untouched():
            _check_run(parser, args, plugin)
            _check_args_of_loss(parser, args, plugin)
        return args

    if "-h" in argv or "--help" in argv:
        for other in load_all_losses().values() if plugin is None else ():
            other.add_arguments(parser)
        print(parser.format_help(), "\nThe flags of open_clip_train:\n", sep="")
        open_clip_parse_args(["--help"])  # exits

    with hooked(parse_args, plugin) as open_clip_main:
        return open_clip_main(argv) or 0


def _loss_of(parser: ArgumentParser, argv: list[str]) -> str:
    """Add `--loss` to `parser`; the name given, or a usage error if none is registered under it."""
    parser.add_argument(
        "--loss",
        default=BUILT_IN,
        metavar="NAME",
        help=f"{BUILT_IN} (open_clip's own, made from its other flags) or one that a package registers, here: "
        f"{', '.join(sorted(registered_losses())) or 'none'} (default: %(default)s)",
    )
    name: str = parser.parse_known_args(argv)[0].loss
    if name != BUILT_IN:
        try:
            find_loss(name)
        except PluginError as error:
            parser.error(f"argument --loss: {error}")
    return name


def _load_plugin(parser: ArgumentParser, name: str) -> LossPlugin | None:
    """Add the arguments of the loss to `parser`; None is open_clip's own loss."""
    if name == BUILT_IN:
        return None
    try:
        plugin = load_loss(name)
    except PluginError as error:
        logger.debug("", exc_info=error)
        parser.error(f"argument --loss: {error}")
    plugin.add_arguments(parser)
    return plugin


def _check_run(parser: ArgumentParser, args: Namespace, plugin: LossPlugin | None) -> None:
    """Before anything is written, reject errors that open_clip would report late, or not at all."""
    from open_clip_train.distributed import world_info_from_env

    _, rank, world_size = world_info_from_env()
    log = Path(args.logs, args.name or "", f"out-{rank}" if args.log_local else "out.log")
    if args.name and rank == 0 and args.resume != "latest" and log.exists():
        parser.error(
            f"argument --name: {args.name!r} is a run already, in {log.parent}; "
            "expected a new name, or --resume latest to go on with that run"
        )
    for flag, path in (("--train-data", args.train_data), ("--val-data", args.val_data)):
        is_csv = args.dataset_type == "csv" or (args.dataset_type == "auto" and str(path).endswith((".csv", ".tsv")))
        if path and is_csv and rank == 0:
            table = _check_csv(parser, args, flag, path)
            if table is None:
                continue
            if flag == "--val-data":
                if args.val_frequency:  # else nothing is measured on them
                    _check_validation_pairs(parser, args, table)
            elif not getattr(args, "use_naflex", False):
                _check_steps(parser, args, len(table), world_size)
    checkpoint = _checkpoint_to_resume(parser, args, log.parent)
    if checkpoint is not None:
        _check_checkpoint(parser, args, checkpoint, plugin, world_size)
    if args.loss_dist_impl in registered_losses():
        # `--los sparc` lands there: argparse takes an unambiguous abbreviation for the whole flag.
        parser.error(
            f"argument --loss-dist-impl: {args.loss_dist_impl!r} is a loss; expected --loss {args.loss_dist_impl}"
        )
    if args.loss != BUILT_IN:
        for flag in ("torchscript", "trace"):
            if getattr(args, flag, False):  # open_clip 4 has neither
                parser.error(
                    f"argument --{flag}: not with --loss {args.loss}; "
                    "a TorchScript model cannot return what a loss plug-in asks of it"
                )


def _check_args_of_loss(parser: ArgumentParser, args: Namespace, plugin: LossPlugin | None) -> None:
    """Let the plug-in reject arguments before anything is written."""
    check_args = getattr(plugin, "check_args", None)
    if check_args is None:
        return
    try:
        check_args(_with_ranks(args))
    except (ValueError, TypeError, ImportError, OSError) as error:
        logger.debug("", exc_info=error)
        parser.error(" ".join(str(error).split()))


@contextmanager
def _logging_untouched() -> Iterator[None]:
    """Restore the handlers of the root logger on exit; open_clip_train sets it up after it has parsed its arguments.

    open_clip calls `logging.info`, which adds a handler to the root logger, and every line would be logged twice.
    """
    root = logging.getLogger()
    handlers = root.handlers[:]
    try:
        yield
    finally:
        root.handlers[:] = handlers


def _with_ranks(args: Namespace) -> Namespace:
    """The arguments with the ranks that open_clip_train adds later, when it starts its process group."""
    from open_clip_train.distributed import world_info_from_env

    local_rank, rank, world_size = world_info_from_env()
    ranks = {"local_rank": local_rank, "rank": rank, "world_size": world_size, "distributed": world_size > 1}
    return Namespace(**{**vars(args), **ranks})


def _check_csv(parser: ArgumentParser, args: Namespace, flag: str, path: str) -> "DataFrame | None":
    """Reject a CSV that training cannot read, and warn of captions that it misreads.

    Returns:
        Its rows; None for an address that cannot be read here: open_clip tries it again.
    """
    from sparc_loss.evaluation.pairs_csv import DataError, missing_captions, read_table

    is_remote = "://" in path and not path.startswith("file://")
    if "://" not in path and not os.path.isfile(os.path.expanduser(path)):
        parser.error(f"argument {flag}: there is no file {path!r}; expected a CSV file")
    try:
        table = read_table(path, args.csv_separator)
    except DataError as error:
        if not is_remote:
            parser.error(f"argument {flag}: {error}")
        print(f"{PROG}: warning: argument {flag}: {error}; it is left to open_clip", file=sys.stderr)
        return None
    for key_flag, key in (("--csv-img-key", args.csv_img_key), ("--csv-caption-key", args.csv_caption_key)):
        if key not in table.columns:
            columns = ", ".join(repr(str(column)) for column in table.columns)
            parser.error(
                f"argument {key_flag}: {path} has no column {key!r}; expected one of {columns} (columns are separated "
                f"by {args.csv_separator!r}, see --csv-separator)"
            )
    warning = missing_captions(table, path, args.csv_separator, args.csv_caption_key)
    if warning is not None:
        print(f"{PROG}: warning: {warning}", file=sys.stderr)
    return table


def _check_validation_pairs(parser: ArgumentParser, args: Namespace, table: "DataFrame") -> None:
    """Reject validation that would fail after the first epoch, before its checkpoint is written."""
    from sparc_loss.evaluation.pairs_csv import line_of

    if len(table) == 0:
        parser.error(f"argument --val-data: {args.val_data} has no pair; expected at least one")
    for row, image in enumerate(table[args.csv_img_key]):
        if not os.path.isfile(str(image)):
            parser.error(
                f"argument --val-data: {args.val_data}, line {line_of(table, row)}: there is no file {str(image)!r}; "
                "expected an image"
            )


def _check_steps(parser: ArgumentParser, args: Namespace, pairs: int, world_size: int) -> None:
    """Reject an epoch without a step: open_clip would save a model that was not trained."""
    # torch's DistributedSampler repeats pairs until each process has the same number.
    of_a_process = math.ceil(pairs / world_size)
    if of_a_process // args.batch_size // args.accum_freq == 0:
        needed = " x ".join(
            f"{flag} {number}"
            for flag, number in (("--batch-size", args.batch_size), ("--accum-freq", args.accum_freq))
        )
        parser.error(
            f"argument --train-data: {args.train_data} has {pairs} pairs for {world_size} process"
            f"{'es' if world_size > 1 else ''}; expected at least {needed} for each, as open_clip drops the last "
            "incomplete batch and an epoch would have no step"
        )


def _checkpoint_to_resume(parser: ArgumentParser, args: Namespace, run: Path) -> Path | None:
    """The file that open_clip will resume from; None if there is none, or none that can be read here."""
    from open_clip_train.main import LATEST_CHECKPOINT_NAME, get_latest_checkpoint

    path = args.resume
    if path is None or args.remote_sync or "://" in path:
        return None
    if path == "latest":
        folder = run / "checkpoints"
        path = folder / LATEST_CHECKPOINT_NAME if args.save_most_recent else get_latest_checkpoint(str(folder), False)
        if path is None and any(folder.glob("*.pt")):
            parser.error(
                f"argument --resume: open_clip finds no checkpoint in {str(folder)!r}, because of the characters [, * "
                "or ? in its name, and would begin anew; expected the path of a checkpoint"
            )
        if path is None or not Path(path).exists():
            return None  # open_clip then starts from the beginning
    path = Path(path).expanduser()  # as fsspec does, which open_clip reads checkpoints with
    if Path(path, ".metadata").is_file():
        return None  # a sharded checkpoint, a folder, as open_clip 4 writes with --fsdp-checkpoint sharded
    if not path.is_file():
        parser.error(f"argument --resume: there is no file {args.resume!r}; expected a checkpoint, or latest")
    return path


def _check_checkpoint(
    parser: ArgumentParser, args: Namespace, path: Path, plugin: LossPlugin | None, world_size: int
) -> None:
    """Reject a checkpoint that cannot be resumed, which open_clip would find out after it has made the folder."""
    import torch

    from sparc_loss.plugins.learned_heads import check_heads
    from sparc_loss.plugins.objective_plugin import ObjectivePlugin

    # torch.save writes a zip, whose end is missing in a truncated file.
    is_zip = zipfile.is_zipfile(path)
    try:
        # This reads only the structure of a zip: tensors of the meta device have no values.
        checkpoint = torch.load(path, map_location="meta", weights_only=True, mmap=is_zip or None)
    except Exception as error:
        if is_zip and isinstance(error, pickle.UnpicklingError):
            parser.error(
                f"argument --resume: {path} cannot be resumed: {why_not_loaded(path, error)}, by --pretrained"
            )
        parser.error(
            f"argument --resume: {path} is truncated or corrupt ({type(error).__name__}), as when a run ends or a "
            "disk is full while it is written; remove it to go on from the one before"
        )
    if not isinstance(checkpoint, dict):
        parser.error(f"argument --resume: {path} holds a {type(checkpoint).__name__}; expected a checkpoint")
    if plugin is not None and not isinstance(plugin, ObjectivePlugin):
        return  # of another package, which knows what its model takes
    try:
        trains = bool(args.train_data) or args.dataset_type == "synthetic"
        check_heads(checkpoint, None if plugin is None else plugin.heads, world_size, trains)
    except ValueError as error:
        parser.error(f"argument --resume: {path} {error}")


if __name__ == "__main__":
    sys.exit(main())
