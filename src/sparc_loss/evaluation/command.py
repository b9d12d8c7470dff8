"""`sparc-loss evaluate`: every measure that a CSV allows, of any open_clip model, as a table and as JSON."""

import json
import logging
import os
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparc_loss import __version__
from sparc_loss._checks import check_number
from sparc_loss.evaluation import dataset
from sparc_loss.evaluation.dataset import DataError, EvaluationData, read_data, read_lines
from sparc_loss.evaluation.markdown import markdown_table
from sparc_loss.functional import ALIGNMENTS
from sparc_loss.model_loading import add_model_flags, complete_from_run, load_model

if TYPE_CHECKING:
    from sparc_loss.evaluation.evaluate import Measure
    from sparc_loss.evaluation.image_dependence import ImageDependence

PROG = "sparc-loss evaluate"
LOSS_SETTINGS = ("sparc_threshold", "sparc_alignment", "sparc_fine_grained_scale", "sparc_tokens")
PRECISIONS = ("amp", "amp_bf16", "amp_bfloat16", "bf16", "fp16", "pure_bf16", "pure_fp16", "fp32")
TITLES = {
    "image_to_text_R@1": "retrieval R@1, image to text",
    "image_to_text_R@5": "retrieval R@5, image to text",
    "image_to_text_R@10": "retrieval R@10, image to text",
    "text_to_image_R@1": "retrieval R@1, text to image",
    "text_to_image_R@5": "retrieval R@5, text to image",
    "text_to_image_R@10": "retrieval R@10, text to image",
    "k_precision": "K-Precision",
    "k_precision_of_nouns_and_adjectives": "K-Precision, nouns and adjectives",
    "hard_negative_accuracy": "hard negatives",
    "zero_shot_top1": "zero-shot classification, top 1",
    "zero_shot_top5": "zero-shot classification, top 5",
    "phrase_pointing": "pointing, phrases",
    "phrase_tokens_pointing": "pointing, phrases as mean of tokens",
    "word_pointing": "pointing, words of captions",
    "mean_iou_of_objects": "mIoU, pixels of objects only",
    "mean_iou": "mIoU, all pixels, no background",
    "mean_iou_with_background": "mIoU with background",
}


def main(argv: list[str] | None = None) -> int:
    """Evaluate, print the table and write the JSON; returns 0.

    Raises:
        SystemExit: with code 2 and one line of error for what cannot be read; then nothing is written.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        complete_from_run(PROG, args, LOSS_SETTINGS)
        _check(args)
        classes = read_lines(args.classes) if args.classes else None
        templates = _templates(args.templates) if args.templates else None
        nouns = {word.lower() for word in read_lines(args.nouns_and_adjectives)} if args.nouns_and_adjectives else None
        data = read_data(
            args.data,
            classes,
            separator=args.csv_separator,
            image_key=args.csv_img_key,
            caption_key=args.csv_caption_key,
        )
        import torch

        args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        model, _, tokenizer = load_model(args)
        from sparc_loss.embeddings import surface_embeddings

        surface_embeddings(model, tokenizer, tokens=args.sparc_tokens or "words")
        from open_clip import get_input_dtype
        from open_clip_train.precision import get_autocast

        from sparc_loss.evaluation.evaluate import Options, evaluate

        options = Options(
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
            **({"templates": templates} if templates else {}),
        )
        measures, dependence = evaluate(model, tokenizer, data, options)
    except ImportError as error:
        parser.error(f"open_clip cannot be imported ({error}); pip install 'sparc-loss[train]'")
    except (TypeError, ValueError) as error:
        logging.debug("", exc_info=error)
        parser.error(" ".join(str(error).split()))
    print(table(measures, dependence), end="")
    if args.output:
        write_json(Path(args.output), summary(args, data, measures, dependence))
    return 0


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
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=PROG,
        usage=f"{PROG} --model NAME [--pretrained TAG|FILE] --data FILE.csv [--output FILE.json] ...",
        allow_abbrev=False,
        formatter_class=RawDescriptionHelpFormatter,
        description="Measure an open_clip model on a CSV: every measure that its columns allow.",
        epilog=dataset.__doc__,
    )
    add = parser.add_argument
    add_model_flags(parser)
    add("--data", required=True, metavar="FILE.csv", help="see below")
    add("--output", metavar="FILE.json", help="write the figures there")
    add("--classes", metavar="FILE.txt", help="names of classes, one per line, for the columns mask and label")
    add(
        "--templates",
        metavar="FILE.txt",
        help="prompts for the classes, one per line, each with a {} (default: open_clip's 80 for ImageNet)",
    )
    add(
        "--background-threshold",
        type=float,
        metavar="X",
        help="also segment with background: pixels whose cosine with each class is below X",
    )
    add(
        "--nouns-and-adjectives",
        metavar="FILE.txt",
        help="words, one per line: also K-Precision of these alone",
    )
    add("--batch-size", type=int, default=64, metavar="N", help="default: %(default)s")
    add("--workers", type=int, default=4, metavar="N", help="processes that read images (default: %(default)s)")
    add("--device", metavar="NAME", help="default: cuda where there is one, else cpu")
    add("--precision", choices=PRECISIONS, default="fp32", help="default: %(default)s")
    add(
        "--csv-separator",
        metavar="TEXT",
        help="as in training (default: a tab if the first line has one, else a comma)",
    )
    add("--csv-img-key", default="filepath", metavar="COLUMN", help="default: %(default)s")
    add("--csv-caption-key", default="title", metavar="COLUMN", help="default: %(default)s")
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


def _check(args: Namespace) -> None:
    """Raise ValueError for numbers out of range and a place where nothing can be written."""
    flags = vars(args)
    for name, minimum, maximum in (
        ("batch_size", 1, float("inf")),
        ("workers", 0, float("inf")),
        ("background_threshold", -1, 1),
        ("sparc_threshold", 0, 1),
        ("sparc_fine_grained_scale", 0, float("inf")),
    ):
        if flags[name] is not None:
            check_number(f"argument --{name.replace('_', '-')}", flags[name], minimum, maximum)
    if args.output:
        path = Path(args.output)
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            problem = "is a folder" if path.is_dir() else "is in no folder that can be written to"
            raise ValueError(f"argument --output: {args.output!r} {problem}; expected a file")


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
