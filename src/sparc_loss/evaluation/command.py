"""`sparc-loss evaluate`: any open_clip model on a CSV or on published benchmarks, as a table and as JSON."""

import json
import logging
import os
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparc_loss import __version__
from sparc_loss._checks import check_number
from sparc_loss._files import check_output, whole_file
from sparc_loss.embeddings.reading_names import READINGS
from sparc_loss.evaluation import dataset
from sparc_loss.evaluation.dataset import DataError, EvaluationData, read_data, read_lines
from sparc_loss.evaluation.markdown import markdown_table
from sparc_loss.evaluation.protocol import OFFERED, PRESETS, PROTOCOL_FIELDS
from sparc_loss.evaluation.titles import TITLES
from sparc_loss.functional import ALIGNMENTS
from sparc_loss.model_loading import add_model_flags, complete_from_run, load_model

if TYPE_CHECKING:
    from sparc_loss.evaluation.evaluate import Measure, Options
    from sparc_loss.evaluation.image_dependence import ImageDependence

PROG = "sparc-loss evaluate"
LOSS_SETTINGS = ("sparc_threshold", "sparc_alignment", "sparc_fine_grained_scale", "sparc_tokens")
OF_DATA = (  # flags for --data alone
    "csv_separator",
    "csv_img_key",
    "csv_caption_key",
    "sparc_threshold",
    "sparc_alignment",
    "sparc_fine_grained_scale",
)
PRECISIONS = ("amp", "amp_bf16", "amp_bfloat16", "bf16", "fp16", "pure_bf16", "pure_fp16", "fp32")


def main(argv: list[str] | None = None) -> int:
    """Evaluate, print the table and write the JSON; returns 0.

    Raises:
        SystemExit: with code 2 and one line of error for what cannot be read; then nothing is written.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if args.list_suites:
        from sparc_loss.evaluation.suites.table import list_of_suites

        print(list_of_suites(), end="")
        return 0
    try:
        _check(parser, args)
        complete_from_run(PROG, args, LOSS_SETTINGS)
        templates = _templates(args.templates) if args.templates else None
        (_evaluate_suites if args.suite else _evaluate_csv)(args, templates)
    except ImportError as error:
        parser.error(f"what it needs cannot be imported ({error}); pip install 'sparc-loss[train]'")
    except (OSError, TypeError, ValueError) as error:
        logging.debug("", exc_info=error)
        parser.error(" ".join(str(error).split()))
    except KeyboardInterrupt:
        print(f"\n{PROG}: interrupted; {_what_is_kept(args)}", file=sys.stderr)
        return 130
    return 0


def _evaluate_csv(args: Namespace, templates: list[str] | None) -> None:
    classes = read_lines(args.classes) if args.classes else None
    data = read_data(
        args.data,
        classes,
        separator=args.csv_separator,
        image_key=args.csv_img_key,
        caption_key=args.csv_caption_key,
    )
    _check_columns(args, data)
    model, tokenizer = _load(args)
    from sparc_loss.embeddings.readings import check_reading
    from sparc_loss.evaluation.evaluate import evaluate

    options = _options(args, templates)
    check_reading(model.visual, options.reading)
    measures, dependence = evaluate(model, tokenizer, data, options)
    print(table(measures, dependence), end="")
    if args.output:
        write_json(Path(args.output), summary(args, data, measures, dependence))


def _evaluate_suites(args: Namespace, templates: list[str] | None) -> None:
    from sparc_loss.evaluation.suites.run import plan, read_known, run
    from sparc_loss.evaluation.suites.table import figures_table

    output = Path(args.output) if args.output else None
    known = read_known(output)
    tasks = plan(args, known, templates)

    def keep(records: dict[str, Any]) -> None:
        if output is None:
            return
        try:
            # Read again: another command may have written other suites there.
            write_json(output, {"sparc_loss": __version__, "suites": {**read_known(output), **records}})
        except OSError as error:
            print(f"{PROG}: warning: {output} cannot be written: {error}", file=sys.stderr)

    records = known
    if any(task.data for task in tasks):
        model, tokenizer = _load(args)
        records = run(tasks, known, model, tokenizer, _options(args, templates), keep)
    print(figures_table({task.suite.name: records[task.suite.name] for task in tasks}), end="")


def _load(args: Namespace) -> "tuple[Any, Any]":
    """The model, surfaced, and its tokenizer."""
    import torch

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, _, tokenizer = load_model(args)
    from sparc_loss.embeddings import surface_embeddings

    return surface_embeddings(model, tokenizer, tokens=args.sparc_tokens or "words"), tokenizer


def _options(args: Namespace, templates: list[str] | None) -> "Options":
    import torch
    from open_clip import get_input_dtype
    from open_clip_train.precision import get_autocast

    from sparc_loss.evaluation.evaluate import Options

    nouns = {word.lower() for word in read_lines(args.nouns_and_adjectives)} if args.nouns_and_adjectives else None
    options = Options(
        reading=args.reading or "last",
        background_threshold=args.background_threshold,
        nouns_and_adjectives=nouns,
        threshold=args.sparc_threshold,
        alignment=args.sparc_alignment or "sparse",
        fine_grained_scale=args.sparc_fine_grained_scale,
        batch_size=args.batch_size,
        workers=args.workers,
        device=args.device,
        input_dtype=get_input_dtype(args.precision) or torch.float32,
        autocast=get_autocast(args.precision, device_type=torch.device(args.device).type),
    )
    return options if templates is None else replace(options, templates=templates)


def _what_is_kept(args: Namespace) -> str:
    if args.suite and args.output:
        return f"the figures of the suites done are in {args.output}, and the same command goes on from there"
    return "nothing is kept" + (", as there is no --output" if args.suite else "")


def table(measures: "Sequence[Measure]", dependence: "ImageDependence | None") -> str:
    """The figures in Markdown: one row per measure, then the probe of image dependence."""
    rows = [["measure", "model", "chance", "ceiling", "count"]]
    for each in measures:
        rows.append([TITLES[each.name], *(f"{figure:.3f}" for figure in each[1:4]), str(each.count)])
    text = markdown_table(rows)
    if dependence is not None:
        rows = [["fine-grained loss on", "loss", "token finds its group", "group finds its token"]]
        for name in ("right", "shuffled", "constant"):
            rows.append([f"{name} images", *(f"{figure:.3f}" for figure in getattr(dependence, name))])
        rows.append(["chance", "", *[f"{dependence.chance:.3f}"] * 2])
        text += "\n" + markdown_table(rows)
    return text


def summary(
    args: Namespace, data: EvaluationData, measures: "Sequence[Measure]", dependence: "ImageDependence | None"
) -> dict[str, Any]:
    """What is written as JSON: what was measured, and every figure in full."""
    record = {
        "sparc_loss": __version__,
        **{name: value for name, value in vars(args).items() if name != "output"},
        "images": len(data.images),
        "captions": len(data.captions),
        "measures": {each.name: {k: v for k, v in each._asdict().items() if k != "name"} for each in measures},
    }
    if dependence is not None:
        parts = ("right", "shuffled", "constant", "shuffled_gap", "constant_gap")
        record["image_dependence"] = {name: getattr(dependence, name)._asdict() for name in parts}
        record["image_dependence"] |= {"chance": dependence.chance, "tokens": dependence.tokens}
    return record


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write the whole file or nothing."""
    with whole_file(path) as draft:
        draft.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=PROG,
        usage=f"{PROG} --model NAME [--pretrained TAG|FILE] (--data FILE.csv | --suite NAMES --data-root FOLDER) "
        "[--output FILE.json] ...",
        allow_abbrev=False,
        formatter_class=RawDescriptionHelpFormatter,
        description="Measure an open_clip model on a CSV, every measure that its columns allow, or on published "
        "benchmarks, beside the published figures.",
        epilog=dataset.__doc__,
    )
    add = parser.add_argument
    add_model_flags(parser)
    add("--data", metavar="FILE.csv", help="see below")
    add(
        "--output",
        metavar="FILE.json",
        help="write the figures there; with --suite, after each suite, and the same command goes on from there",
    )
    add(
        "--classes",
        metavar="FILE.txt",
        help="names of classes, one per line, for the columns mask and label; with --suite, in place of the "
        "published names, where commas separate the names of one class",
    )
    add(
        "--templates",
        metavar="FILE.txt",
        help="prompts for the classes, one per line, each with a {} (default: open_clip's 80 for ImageNet)",
    )
    add(
        "--background-threshold",
        type=float,
        metavar="X",
        help="also segment with background: pixels whose cosine with each class is below X; with --suite, whose "
        "probability is below X",
    )
    add(
        "--nouns-and-adjectives",
        metavar="FILE.txt",
        help="words, one per line: also K-Precision of these alone",
    )
    add("--reading", choices=READINGS, help="what a ViT's last block gives as patches (default: last)")
    add("--batch-size", type=int, default=64, metavar="N", help="default: %(default)s")
    add(
        "--workers",
        type=int,
        default=min(4, os.cpu_count() or 1),  # PyTorch warns of more processes than cores
        metavar="N",
        help="processes that read images (default: one per core, at most 4)",
    )
    add("--device", metavar="NAME", help="default: cuda where there is one, else cpu")
    add("--precision", choices=PRECISIONS, default="fp32", help="default: %(default)s")
    add(
        "--csv-separator",
        metavar="TEXT",
        help="as in training (default: a tab if the first line has one, else a comma)",
    )
    add("--csv-img-key", default="filepath", metavar="COLUMN", help="default: %(default)s")
    add("--csv-caption-key", default="title", metavar="COLUMN", help="default: %(default)s")
    _add_suite_flags(parser)
    probe = parser.add_argument_group(
        "The fine-grained loss whose dependence on the image is measured",
        "Default: as in params.txt of the run, else:",
    )
    add = probe.add_argument
    add("--sparc-threshold", type=float, metavar="X", help="default: 1 / number of patches")
    add("--sparc-alignment", choices=ALIGNMENTS, help="default: sparse")
    add("--sparc-fine-grained-scale", type=float, metavar="X", help="default: the model's logit_scale")
    add("--sparc-tokens", choices=("words", "all"), help="default: words")
    return parser


def _add_suite_flags(parser: ArgumentParser) -> None:
    add = parser.add_argument_group(
        "Published benchmarks", "The flags from --short-side on replace a part of the protocol of segmentation."
    ).add_argument
    add("--suite", metavar="NAMES", help="benchmarks, by commas, such as voc20,ade20k,coco")
    add("--list-suites", action="store_true", help="print each benchmark's files, protocols and published figures")
    add("--data-root", metavar="FOLDER", help="of the data sets, laid out as --list-suites prints")
    add("--protocol", choices=PRESETS, help="of segmentation (default: plain)")
    add("--limit", type=int, metavar="N", help="measure the first N images only")
    add("--skip-missing", action="store_true", help="leave out images that a list names and the folder lacks")
    add("--short-side", type=int, metavar="N", help="resize images to this many pixels")
    add("--window", type=int, metavar="N", help="pixels of a side of a window; 0 is the whole image")
    add("--stride", type=int, metavar="N", help="pixels from one window to the next")
    add("--logit-scale", type=float, metavar="X", help="factor of the cosines before the softmax over the names")
    add("--minimal-area", type=float, metavar="X", help="take out classes with no larger share of an image's objects")
    add("--ignored-values", type=int, nargs="+", metavar="N", help="of masks: pixels left out, such as 0 255")
    add("--classes-offered", choices=OFFERED, help="to each image: all classes, or those present in its mask")


def _check(parser: ArgumentParser, args: Namespace) -> None:
    """Raise ValueError for flags that disagree, numbers out of range and a place where nothing can be written."""
    flags = vars(args)
    if (args.data is None) == (args.suite is None):
        found = "neither given" if args.data is None else "both given"
        raise ValueError(f"arguments --data and --suite: {found}; expected --data FILE.csv or --suite NAMES")
    if args.suite and not args.data_root:
        raise ValueError("argument --data-root: not given; expected the folder of the data sets of --suite")
    for name in ("data_root", "limit", "protocol", "skip_missing", *PROTOCOL_FIELDS):
        if args.data and name not in ("reading", "background_threshold") and flags[name] not in (None, False):
            raise ValueError(f"argument --{name.replace('_', '-')}: given with --data; it is for --suite only")
    for name in OF_DATA:
        if args.suite and flags[name] != parser.get_default(name):
            raise ValueError(f"argument --{name.replace('_', '-')}: given with --suite; it is for --data only")
    for name, minimum, maximum in (
        ("batch_size", 1, float("inf")),
        ("workers", 0, float("inf")),
        ("background_threshold", -1, 1),
        ("limit", 1, float("inf")),
        ("sparc_threshold", 0, 1),
        ("sparc_fine_grained_scale", 0, float("inf")),
    ):
        if flags[name] is not None:
            check_number(f"argument --{name.replace('_', '-')}", flags[name], minimum, maximum)
    if args.output:
        inputs = (args.data, args.classes, args.templates, args.nouns_and_adjectives, args.pretrained)
        check_output(Path(args.output), *inputs)


def _check_columns(args: Namespace, data: EvaluationData) -> None:
    """Raise ValueError for a flag that changes nothing with the columns of the CSV."""
    masks, labels = (any(each is not None for each in column) for column in (data.masks, data.labels))
    for name, is_used, column in (
        ("background_threshold", masks, "mask"),
        ("classes", masks or labels, "mask or label"),
        ("templates", masks or labels, "mask or label"),
    ):
        if getattr(args, name) is not None and not is_used:
            raise ValueError(f"argument --{name.replace('_', '-')}: given, but {args.data} has no column {column}")


def _templates(path: str) -> list[str]:
    templates = read_lines(path)
    for template in templates:
        try:
            whole = template.format("\0").count("\0") == 1
        except (IndexError, KeyError, ValueError):
            whole = False
        if not whole:
            raise DataError(f"{path} has the prompt {template!r}; expected one {{}} in each line, for the class")
    return templates


if __name__ == "__main__":
    sys.exit(main())
