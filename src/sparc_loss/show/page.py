"""The alignment of words and patches as an interactive page: one HTML file that loads nothing else."""

import base64
import hashlib
import io
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image, ImageDraw

from sparc_loss.show.alignment import AlignedPair

# The outline of annotated boxes.
BOX = "#7dd3fc"
_PLAIN_TITLE = "What each word selects"
_environment = Environment(loader=PackageLoader("sparc_loss.show"), autoescape=True, undefined=StrictUndefined)


def alignment_page(pairs: Sequence[AlignedPair], title: str = _PLAIN_TITLE) -> str:
    """Lay out aligned pairs as one HTML page.

    Pointing at a word, or moving to it with Tab, lights its patches; a click, Enter or Space pins it and Escape lets
    go. Pointing at a patch, or moving over the image with the arrow keys, lights the words that select it.

    Args:
        pairs: from `align`, one or more.
        title: of the page.

    Returns:
        HTML with its image, style and script inside. Captions and titles are shown as text, whatever they hold.

    Raises:
        ValueError: no pairs.
    """
    if not pairs:
        raise ValueError("pairs is empty; expected at least one aligned pair")
    templates = files("sparc_loss.show") / "templates"
    style, script = ((templates / name).read_text("utf-8") for name in _INLINED)
    return _environment.get_template("page.html.jinja").render(
        title=title,
        pairs=[_content(pair) for pair in pairs],
        style=style,
        script=script,
        # The browser runs this script and no other, and fetches nothing.
        policy=f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'",
    )


_INLINED = ("page.css", "page.js")


def _content(pair: AlignedPair) -> dict[str, Any]:
    rows, columns = pair.weights.shape[1:]
    height, width = pair.pixels.shape[:2]
    patch_height, patch_width = pair.patch_size
    return {
        "title": pair.title,
        "caption": pair.caption,
        "image": _data_uri(pair),
        "width": width,
        "height": height,
        "data": {
            "grid": [rows, columns],
            # The grid's share of the image, which may have pixels left over on the right and below.
            "extent": [rows * patch_height / height, columns * patch_width / width],
            "words": [pair.caption[word] for word in pair.caption.read],
            "weights": [[float(f"{weight:.4g}") for weight in row.flatten().tolist()] for row in pair.weights],
        },
    }


def _data_uri(pair: AlignedPair) -> str:
    file, image = io.BytesIO(), Image.fromarray(pair.pixels)
    for (left, top, right, bottom), _ in pair.boxes:
        ImageDraw.Draw(image).rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=BOX)
    image.save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _digest(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
