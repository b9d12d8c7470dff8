"""`sparc-loss evaluate`: every measure that a CSV allows, of any open_clip model, as a table and as JSON."""

import difflib
import json
import logging
import os
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparc_loss import __version__
from sparc_loss._validation import check_number
from sparc_loss.evaluation import dataset
from sparc_loss.evaluation.dataset import DataError, EvaluationData, read_data, read_lines
from sparc_loss.evaluation.markdown import markdown_table
from sparc_loss.functional import ALIGNMENTS

if TYPE_CHECKING:
    from torch import nn

    from sparc_loss.evaluation.evaluate import Measure
    from sparc_loss.evaluation.image_dependence import ImageDependence

PROG = "sparc-loss evaluate"
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
        model, tokenizer = load_model(args)
        from open_clip import get_input_dtype
        from open_clip_train.precision import get_autocast

        from sparc_loss.evaluation.evaluate import Options, evaluate

        options = Options(
            background_threshold=args.background_threshold,
            nouns_and_adjectives=nouns,
            threshold=args.sparc_threshold,
            alignment=args.sparc_alignment,
            fine_grained_scale=args.sparc_scale,
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
    except ValueError as error:
        logging.debug("", exc_info=error)
        parser.error(" ".join(str(error).split()))
    print(table(measures, dependence), end="")
    if args.output:
        write_json(Path(args.output), summary(args, data, measures, dependence))
    return 0


def load_model(args: Namespace) -> "tuple[nn.Module, Any]":
    """The model of `--model` and `--pretrained`, surfaced, and its tokenizer.

    Unlike `open_clip.create_model`, which ignores `--pretrained` beside a local-dir: or hf-hub: model and starts from
    random weights where it finds none, this takes the one and refuses the other.

    Raises:
        ValueError: a model or weights that open_clip cannot load, or that cannot be surfaced.
        ImportError: without open_clip.
    """
    import open_clip

    from sparc_loss.embeddings import surface_embeddings

    described = args.model.startswith(("local-dir:", "hf-hub:"))
    if not described and args.model not in open_clip.list_models():
        nearest = difflib.get_close_matches(args.model, open_clip.list_models(), n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(
            f"argument --model: {args.model!r} is no model of open_clip; expected one of open_clip.list_models(), "
            f"local-dir:FOLDER or hf-hub:ORGANISATION/NAME{hint}"
        )
    if not described and not args.pretrained:
        raise ValueError(
            f"argument --pretrained: expected a tag or a checkpoint, for {args.model} has no weights else"
        )
    weights_apart = described and args.pretrained
    if weights_apart and not Path(args.pretrained).is_file():
        raise ValueError(f"argument --pretrained: there is no file {args.pretrained!r}")
    size = args.force_image_size
    options = {
        "precision": args.precision,
        "device": args.device,
        "force_quick_gelu": args.force_quick_gelu,
        "force_custom_text": args.force_custom_text,
        # One number is a square, as open_clip_train takes it.
        "force_image_size": size[0] if size and len(size) == 1 else size,
        "force_context_length": args.force_context_length,
        "cache_dir": args.cache_dir,
    }
    try:
        if weights_apart:
            logging.disable(logging.WARNING)  # that no weights were found, which come now
            try:
                model = open_clip.create_model(args.model, load_weights=False, pretrained_text=False, **options)
            finally:
                logging.disable(logging.NOTSET)
            open_clip.load_checkpoint(model, args.pretrained)
        else:
            model = open_clip.create_model(args.model, args.pretrained, require_pretrained=True, **options)
        tokenizer = open_clip.get_tokenizer(
            args.model, context_length=args.force_context_length, cache_dir=args.cache_dir
        )
        return surface_embeddings(model, tokenizer, tokens=args.sparc_tokens), tokenizer
    except Exception as error:  # open_clip, torch, safetensors and the hub each raise their own
        what = f"{args.model} with {args.pretrained}" if args.pretrained else args.model
        reason = " ".join(str(error).split())
        reason = reason if len(reason) <= 300 else reason[:297] + "..."
        raise ValueError(f"{what} cannot be loaded: {type(error).__name__}: {reason}") from error


def table(measures: "Sequence[Measure]", dependence: "ImageDependence | None") -> str:
    """The figures in Markdown: one row per measure, then the probe of image dependence."""
    rows = [["measure", "model", "chance", "ceiling", "count"]]
    rows += [[TITLES[each.name], *(f"{figure:.3f}" for figure in each[1:4]), str(each.count)] for each in measures]
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
    add("--model", required=True, metavar="NAME", help="a model of open_clip, local-dir:FOLDER or hf-hub:NAME")
    add("--pretrained", metavar="TAG|FILE", help="a tag of open_clip, or a checkpoint of any training with it")
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
    model = parser.add_argument_group("As in the training of the model")
    add = model.add_argument
    add("--force-image-size", type=int, nargs="+", metavar="N")
    add("--force-context-length", type=int, metavar="N")
    add("--force-quick-gelu", action="store_true")
    add("--force-custom-text", action="store_true")
    add("--cache-dir", metavar="FOLDER", help="for what open_clip downloads")
    probe = parser.add_argument_group("The fine-grained loss whose dependence on the image is measured")
    add = probe.add_argument
    add("--sparc-threshold", type=float, metavar="X", help="default: 1 / number of patches")
    add("--sparc-alignment", choices=ALIGNMENTS, default="sparse", help="default: %(default)s")
    add("--sparc-scale", type=float, metavar="X", help="default: the model's logit_scale")
    add("--sparc-tokens", choices=("words", "all"), default="words", help="default: %(default)s")
    return parser


def _check(args: Namespace) -> None:
    """Raise ValueError for numbers out of range and a place where nothing can be written."""
    flags = vars(args)
    for name, minimum, maximum in (
        ("batch_size", 1, float("inf")),
        ("workers", 0, float("inf")),
        ("background_threshold", -1, 1),
        ("sparc_threshold", 0, 1),
        ("sparc_scale", 0, float("inf")),
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
