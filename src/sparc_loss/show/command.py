"""`sparc-loss show IMAGE "CAPTION" --model NAME --pretrained TAG -o words.png|words.html`, or `--data FILE.csv`."""

import logging
import sys
from argparse import ArgumentParser, ArgumentTypeError
from pathlib import Path
from typing import NamedTuple

from sparc_loss._files import check_output, whole_file
from sparc_loss.embeddings.reading_names import READINGS
from sparc_loss.evaluation.pairs_csv import DataError, line_of, read_pairs, separator_of
from sparc_loss.functional import ALIGNMENTS
from sparc_loss.model_loading import add_model_flags, complete_from_run, load_model
from sparc_loss.named_objects import NamedObject, parse_objects
from sparc_loss.show.alignment import align, read_image
from sparc_loss.show.figure import draw
from sparc_loss.show.page import alignment_page

PROG = "sparc-loss show"
_PICTURES = (".png", ".pdf", ".svg")
_PAGES = (".html", ".htm")


def main(argv: list[str]) -> int:
    """Run the command; returns 0, or 130 if it is interrupted.

    Raises:
        SystemExit: with code 2 and one line of error for bad arguments, an image that cannot be read, a caption
            without words, a model that cannot be loaded.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if len(args.pairs) % 2:
        parser.error(f"{len(args.pairs)} arguments given; expected an image and a caption, or several such pairs")
    if bool(args.pairs) == (args.data is not None):
        parser.error("expected either an image and a caption, or several such pairs, or --data")
    if args.number < 1:
        parser.error(f"argument --number: {args.number} given; expected 1 or more")
    try:
        check_output(args.output, *args.pairs[::2], args.data, args.pretrained)
        pairs = [Pair(*each) for each in zip(args.pairs[::2], args.pairs[1::2], strict=True)]
        if args.data is not None:
            pairs = _first_pairs(args.data, args.number)
        for pair in pairs:  # before the model, which takes longer
            read_image(pair.image)
        complete_from_run(PROG, args, ("sparc_threshold", "sparc_alignment"))
        model, preprocess, tokenizer = load_model(args)
        options = {
            "threshold": args.sparc_threshold,
            "alignment": args.sparc_alignment or "sparse",
            "reading": args.reading,
        }
        parts = model, preprocess, tokenizer
        aligned = [align(pair.image, pair.caption, *parts, objects=pair.objects, **options) for pair in pairs]
        _write(args.output, aligned, args.smooth)
    except ImportError as error:
        parser.error(f"what it needs cannot be imported ({error}); pip install 'sparc-loss[show]'")
    except (OSError, TypeError, ValueError) as error:
        logging.debug("", exc_info=error)
        parser.error(" ".join(str(error).split()))
    except KeyboardInterrupt:
        print(f"\n{PROG}: interrupted; nothing is written", file=sys.stderr)
        return 130
    print(args.output)
    return 0


class Pair(NamedTuple):
    """An image, its caption, and the objects that the caption names."""

    image: str
    caption: str
    objects: tuple[NamedObject, ...] = ()


def _first_pairs(path: Path, number: int) -> list[Pair]:
    """The first pairs of a CSV, with the objects of its column `boxes`.

    Raises:
        DataError: it cannot be read, or has no pair, or the boxes of one are malformed.
    """
    table = read_pairs(path, separator_of(path), "filepath", "title", ["boxes"]).head(number)
    if not len(table):
        raise DataError(f"{path} has no pair; expected at least one")
    pairs = []
    for row in range(len(table)):
        image, caption = (str(table[name].iloc[row]) for name in ("filepath", "title"))
        boxes = table["boxes"].iloc[row] if "boxes" in table.columns else ""
        try:
            pairs.append(Pair(image, caption, parse_objects(boxes, caption) if boxes else ()))
        except ValueError as error:
            raise DataError(f"{path}, line {line_of(table, row)}: {error}") from error
    return pairs


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=PROG,
        usage='%(prog)s IMAGE "CAPTION" [IMAGE "CAPTION" ...] --model NAME --pretrained TAG|FILE -o FILE [options]\n'
        "       %(prog)s --data FILE --model NAME --pretrained TAG|FILE -o FILE [options]",
        description="Draw what each word of a caption selects of an image: the alignment weights of SPARC's loss.",
        allow_abbrev=False,
    )
    parser.add_argument("pairs", nargs="*", metavar='IMAGE "CAPTION"', help="one pair or several")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="instead of pairs, a CSV as sparc-loss evaluate reads it; the boxes of its objects are drawn as well",
    )
    parser.add_argument(
        "--number",
        type=int,
        default=4,
        metavar="N",
        help="of pairs, the first of --data (default: %(default)s)",
    )
    add_model_flags(parser)
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        type=_output,
        metavar="FILE",
        help=f"a picture ({', '.join(_PICTURES)}), or a page to point into ({_PAGES[0]})",
    )
    parser.add_argument(
        "--threshold",
        dest="sparc_threshold",
        type=float,
        metavar="X",
        help="sigma of Eq. 3 (default: that of the run, else 1 / number of patches)",
    )
    parser.add_argument(
        "--alignment",
        dest="sparc_alignment",
        choices=ALIGNMENTS,
        help="how weights are made (default: that of the run, else sparse)",
    )
    parser.add_argument(
        "--reading",
        choices=READINGS,
        default="last",
        help="what a ViT's last block gives as patches (default: %(default)s, which the loss trains)",
    )
    parser.add_argument("--smooth", action="store_true", help="pictures blend from patch to patch")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="default: %(default)s")
    parser.set_defaults(precision="fp32")
    return parser


def _output(path: str) -> Path:
    if Path(path).suffix.lower() not in _PICTURES + _PAGES:
        raise ArgumentTypeError(f"{path!r} given; expected a name that ends in {', '.join(_PICTURES + _PAGES[:1])}")
    return Path(path)


def _write(path: Path, aligned: list, smooth: bool) -> None:
    with whole_file(path) as draft:
        if path.suffix.lower() in _PAGES:
            draft.write_text(alignment_page(aligned), encoding="utf-8")
        else:
            draw(aligned, smooth=smooth).savefig(draft)
