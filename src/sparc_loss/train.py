"""Train with stock open_clip and any loss plug-in: `python -m sparc_loss.train --loss sparc <open_clip_train flags>`.

With several processes: `torchrun --nproc_per_node 8 -- -m sparc_loss.train --loss sparc ...`.
"""

import logging
import sys
import zipfile
from argparse import ArgumentParser, Namespace
from pathlib import Path

from sparc_loss.integration.plugin import (
    BUILT_IN,
    LossPlugin,
    PluginError,
    load_all_losses,
    load_loss,
    registered_losses,
)
from sparc_loss.integration.versions import UntestedVersionError, check_version

PROG = "python -m sparc_loss.train"


def main(argv: list[str] | None = None) -> int:
    """Run open_clip's training with the named loss and return its exit code (0 where it returns none).

    Raises:
        SystemExit: with code 2 and one line of error for bad arguments, a missing package or an untested open_clip.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = ArgumentParser(prog=PROG, add_help=False, allow_abbrev=False, usage=f"{PROG} [--loss NAME] ...")
    try:
        import open_clip

        check_version(open_clip.__version__)
        from open_clip_train.params import parse_args as open_clip_parse_args

        from sparc_loss.integration.hooks import hooked
    except ImportError as error:
        parser.error(f"open_clip's training cannot be imported ({error}); pip install 'sparc-loss[train]'")
    except UntestedVersionError as error:
        parser.error(str(error))
    plugin = _load_plugin(parser, argv)

    def parse_args(argv: list[str]) -> Namespace:
        loss_args, rest = parser.parse_known_args(argv)
        args = open_clip_parse_args(rest)
        vars(args).update(vars(loss_args))
        _check_run(parser, args)
        return args

    if "-h" in argv or "--help" in argv:
        for other in load_all_losses().values() if plugin is None else ():
            other.add_arguments(parser)
        print(parser.format_help(), "\nThe flags of open_clip_train:\n", sep="")
        open_clip_parse_args(["--help"])  # exits

    with hooked(parse_args, plugin) as open_clip_main:
        return open_clip_main(argv) or 0


def _load_plugin(parser: ArgumentParser, argv: list[str]) -> LossPlugin | None:
    """Add `--loss` and the arguments of the loss it names to `parser`; None is open_clip's own loss."""
    parser.add_argument(
        "--loss",
        default=BUILT_IN,
        metavar="NAME",
        help=f"{BUILT_IN} (open_clip's own, made from its other flags) or one that a package registers, here: "
        f"{', '.join(sorted(registered_losses())) or 'none'} (default: %(default)s)",
    )
    name = parser.parse_known_args(argv)[0].loss
    if name == BUILT_IN:
        return None
    try:
        plugin = load_loss(name)
    except PluginError as error:
        logging.debug("", exc_info=error)
        parser.error(f"argument --loss: {error}")
    plugin.add_arguments(parser)
    return plugin


def _check_run(parser: ArgumentParser, args: Namespace) -> None:
    """Refuse what open_clip would notice late, or not at all, before anything is written."""
    from open_clip_train.distributed import world_info_from_env

    _, rank, _ = world_info_from_env()
    log = Path(args.logs, args.name or "", f"out-{rank}" if args.log_local else "out.log")
    if args.name and rank == 0 and args.resume != "latest" and log.exists():
        parser.error(
            f"argument --name: {args.name!r} is a run already, in {log.parent}; "
            "expected a new name, or --resume latest to go on with that run"
        )
    for flag, path in (("--train-data", args.train_data), ("--val-data", args.val_data)):
        is_csv = args.dataset_type == "csv" or (args.dataset_type == "auto" and str(path).endswith((".csv", ".tsv")))
        if path and is_csv and rank == 0:
            _check_csv(parser, args, flag, path)
    _check_checkpoint(parser, args, log.parent)
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


def _check_csv(parser: ArgumentParser, args: Namespace, flag: str, path: str) -> None:
    import pandas

    if not Path(path).is_file():
        parser.error(f"argument {flag}: there is no file {path!r}; expected a CSV file")
    columns = pandas.read_csv(path, sep=args.csv_separator, nrows=0).columns
    for key_flag, key in (("--csv-img-key", args.csv_img_key), ("--csv-caption-key", args.csv_caption_key)):
        if key not in columns:
            parser.error(
                f"argument {key_flag}: {path} has no column {key!r}; expected one of {', '.join(map(repr, columns))} "
                f"(columns are separated by {args.csv_separator!r}, see --csv-separator)"
            )
    captions = pandas.read_csv(path, sep=args.csv_separator, usecols=[args.csv_caption_key])[args.csv_caption_key]
    empty = captions.isna().sum()
    if empty:
        print(
            f"{PROG}: warning: {empty} of {len(captions)} captions in {path} are empty; open_clip reads each of them "
            "as the word 'nan'",
            file=sys.stderr,
        )


def _check_checkpoint(parser: ArgumentParser, args: Namespace, run: Path) -> None:
    import torch
    from open_clip_train.main import LATEST_CHECKPOINT_NAME, get_latest_checkpoint

    path = args.resume
    if path is None or args.remote_sync or "://" in path:
        return
    if path == "latest":
        folder = run / "checkpoints"
        path = folder / LATEST_CHECKPOINT_NAME if args.save_most_recent else get_latest_checkpoint(str(folder), False)
        if path is None or not Path(path).exists():
            return  # open_clip then starts from the beginning
    is_sharded = Path(path, ".metadata").is_file()  # a folder, as open_clip 4 writes with --fsdp-checkpoint sharded
    if is_sharded:
        return
    if not Path(path).is_file():
        parser.error(f"argument --resume: there is no file {path!r}; expected a checkpoint, or latest")
    if not zipfile.is_zipfile(path):  # what torch.save has written since 1.6; the end of a file tells that it is whole
        try:
            torch.load(path, map_location="meta", weights_only=True)
        except Exception as error:
            parser.error(
                f"argument --resume: {path} is no whole checkpoint ({type(error).__name__}), as when a run ends or a "
                "disk is full while it is written; remove it to go on from the one before"
            )


if __name__ == "__main__":
    sys.exit(main())
