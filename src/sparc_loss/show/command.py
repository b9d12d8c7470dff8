"""`sparc-loss show IMAGE "CAPTION" --model NAME --pretrained TAG -o words.png|words.html`."""

import logging
from argparse import ArgumentParser, ArgumentTypeError
from pathlib import Path

from sparc_loss.embeddings.reading_names import READINGS
from sparc_loss.functional import ALIGNMENTS
from sparc_loss.model_loading import add_model_flags, complete_from_run, load_model
from sparc_loss.show.alignment import align, read_image
from sparc_loss.show.figure import draw
from sparc_loss.show.page import alignment_page

PROG = "sparc-loss show"
_PICTURES = (".png", ".pdf", ".svg")
_PAGES = (".html", ".htm")


def main(argv: list[str]) -> int:
    """Run the command; returns 0.

    Raises:
        SystemExit: with code 2 and one line of error for bad arguments, an image that cannot be read, a caption
            without words, a model that cannot be loaded.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if len(args.pairs) % 2:
        parser.error(f"{len(args.pairs)} arguments given; expected an image and a caption, or several such pairs")
    pairs = list(zip(args.pairs[::2], args.pairs[1::2], strict=True))
    try:
        for image, _ in pairs:  # before the model, which takes longer
            read_image(image)
        complete_from_run(PROG, args, ("sparc_threshold", "sparc_alignment"))
        model, preprocess, tokenizer = load_model(args)
        options = {
            "threshold": args.sparc_threshold,
            "alignment": args.sparc_alignment or "sparse",
            "reading": args.reading,
        }
        aligned = [align(image, caption, model, preprocess, tokenizer, **options) for image, caption in pairs]
        _write(args.output, aligned, args.smooth)
    except (OSError, TypeError, ValueError) as error:
        logging.debug("", exc_info=error)
        parser.error(" ".join(str(error).split()))
    print(args.output)
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=PROG,
        usage='%(prog)s IMAGE "CAPTION" [IMAGE "CAPTION" ...] --model NAME --pretrained TAG|FILE -o FILE [options]',
        description="Draw what each word of a caption selects of an image: the alignment weights of SPARC's loss.",
        allow_abbrev=False,
    )
    parser.add_argument("pairs", nargs="+", metavar='IMAGE "CAPTION"', help="one pair or several")
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
    if path.suffix.lower() in _PAGES:
        path.write_text(alignment_page(aligned), encoding="utf-8")
    else:
        draw(aligned, smooth=smooth).savefig(path)
