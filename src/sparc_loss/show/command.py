"""`sparc-loss show IMAGE "CAPTION" --model NAME --pretrained TAG -o words.png|words.html`."""

import logging
import textwrap
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
from torch import Tensor, nn

from sparc_loss.functional import ALIGNMENTS
from sparc_loss.show.alignment import align, read_image
from sparc_loss.show.figure import draw
from sparc_loss.show.page import alignment_page

_PICTURES = (".png", ".pdf", ".svg")
_PAGES = (".html", ".htm")


def main(argv: list[str]) -> int:
    """Run the command; returns 0.

    Raises:
        SystemExit: with code 2 and one line of error for bad arguments, an image that cannot be read, a caption
            without words, a model that cannot be had.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if len(args.pairs) % 2:
        parser.error(f"{len(args.pairs)} arguments given; expected an image and a caption, or several such pairs")
    pairs = list(zip(args.pairs[::2], args.pairs[1::2], strict=True))
    try:
        for image, _ in pairs:  # before the model, which takes longer
            read_image(image)
        model, preprocess, tokenizer = _create(args)
        options = {"threshold": args.threshold, "alignment": args.alignment}
        aligned = [align(image, caption, model, preprocess, tokenizer, **options) for image, caption in pairs]
        _write(args.output, aligned, args.smooth)
    except (OSError, TypeError, ValueError) as error:
        logging.debug("", exc_info=error)
        parser.error(textwrap.shorten(str(error), 600, placeholder=" ..."))
    print(args.output)
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="sparc-loss show",
        usage='%(prog)s IMAGE "CAPTION" [IMAGE "CAPTION" ...] --model NAME [--pretrained TAG] -o FILE [options]',
        description="Draw what each word of a caption selects of an image: the alignment weights of SPARC's loss.",
        allow_abbrev=False,
    )
    parser.add_argument("pairs", nargs="+", metavar='IMAGE "CAPTION"', help="one pair or several")
    parser.add_argument(
        "--model", required=True, metavar="NAME", help="as open_clip names it: ViT-B-32, hf-hub:..., local-dir:..."
    )
    parser.add_argument(
        "--pretrained",
        metavar="TAG",
        help="open_clip's tag of the weights, or a file of weights, such as a checkpoint of a training",
    )
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        type=_output,
        metavar="FILE",
        help=f"a picture ({', '.join(_PICTURES)}), or a page to point into ({_PAGES[0]})",
    )
    parser.add_argument("--threshold", type=float, metavar="X", help="sigma of Eq. 3 (default: 1 / number of patches)")
    parser.add_argument(
        "--alignment", choices=ALIGNMENTS, default="sparse", help="how weights are made (default: %(default)s)"
    )
    parser.add_argument("--smooth", action="store_true", help="pictures blend from patch to patch")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="default: %(default)s")
    return parser


def _create(args: Namespace) -> tuple[nn.Module, Callable[..., Tensor], Any]:
    """The model, its preprocessing and its tokenizer."""
    has_schema = args.model.startswith(("local-dir:", "hf-hub:"))
    if not has_schema and not args.pretrained:
        tags = open_clip.list_pretrained_tags_by_model(args.model)
        expected = ", ".join([*tags, "or a file of weights"])
        raise ValueError(f"argument --pretrained: not given, and {args.model} is only a name; expected {expected}")
    # With such a model open_clip would leave `pretrained` aside.
    checkpoint = args.pretrained if has_schema else None
    if checkpoint and not Path(checkpoint).is_file():
        raise ValueError(f"argument --pretrained: there is no file {checkpoint!r}; expected one of weights")
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(
            args.model,
            pretrained=None if has_schema else args.pretrained,
            device=args.device,
            # The checkpoint has the text tower's weights: none are to be downloaded for it.
            **({"pretrained_hf": False} if checkpoint else {"require_pretrained": True}),
        )
        if checkpoint:
            open_clip.load_checkpoint(model, checkpoint)
        return model, preprocess, open_clip.get_tokenizer(args.model)
    # Of many kinds: from open_clip, from downloads, from every format that weights come in.
    except Exception as error:
        raise ValueError(f"argument --model: {args.model} cannot be had ({error})") from error


def _output(path: str) -> Path:
    if Path(path).suffix.lower() not in _PICTURES + _PAGES:
        raise ArgumentTypeError(f"{path!r} given; expected a name that ends in {', '.join(_PICTURES + _PAGES[:1])}")
    return Path(path)


def _write(path: Path, aligned: list, smooth: bool) -> None:
    if path.suffix.lower() in _PAGES:
        path.write_text(alignment_page(aligned), encoding="utf-8")
    else:
        draw(aligned, smooth=smooth).savefig(path)
