"""The alignment of words and patches as a matplotlib figure: the image once per word, lit where the word looks."""

import logging
import math
import textwrap
import unicodedata
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor, nn

from sparc_loss.embeddings.reading_names import Reading
from sparc_loss.functional import Alignment
from sparc_loss.named_objects import Box
from sparc_loss.show.alignment import AlignedPair, align

# In inches.
_PANEL, _GAP, _MARGIN, _LABEL, _LINE = 1.3, 0.14, 0.3, 0.32, 0.2
_INK, _QUIET, _NOTICE, _NIGHT = "#1d2129", "#6b7280", "#a15c00", (0.055, 0.065, 0.09)
_MARK, _BOX = "#ffb224", "#7dd3fc"
_FONT = "DejaVu Sans"  # comes with matplotlib
_LETTERS = 18  # of the longest label; smaller than these fit in, it could not be read
_LEGEND = (
    "Light: (weight / the word's highest weight)². Per cent: the share of patches that the word keeps, "
    "those of a weight above 0. Framed: its highest patch."
)


def alignment_figure(
    image: Image.Image | str | Path,
    caption: str,
    model: nn.Module,
    preprocess: Callable[[Image.Image], Tensor],
    tokenizer: Any,
    *,
    threshold: float | None = None,
    alignment: Alignment = "sparse",
    reading: Reading = "last",
    smooth: bool = False,
) -> Figure:
    """Draw what each word of a caption selects of an image.

    Args:
        image: a PIL image, or the path of a file.
        caption: at least one word.
        model: any that `surface_embeddings` takes; left as it was.
        preprocess: of evaluation, as `open_clip.create_model_and_transforms` returns it last.
        tokenizer: the model's own, from `open_clip.get_tokenizer`.
        threshold: sigma of Eq. 3, in [0, 1]; None is 1/P.
        alignment: "sparse", "dense" or "softmax", see `functional.alignment_weights`.
        reading: what a ViT's last block gives as patches, see `sparc_loss.embeddings.readings`.
        smooth: blend from patch to patch instead of showing their edges.

    Returns:
        A figure of its own, known to no pyplot state: `figure.savefig(path)`, or the last line of a notebook's cell.

    Raises:
        TypeError: a model, preprocess or tokenizer that is not known, a tower for which the reading has no meaning.
        ValueError: an image that cannot be read, a caption without words, a wrong threshold, alignment or reading.
    """
    pair = align(
        image, caption, model, preprocess, tokenizer, threshold=threshold, alignment=alignment, reading=reading
    )
    return draw([pair], smooth=smooth)


def draw(
    pairs: Sequence[AlignedPair], *, smooth: bool = False, words: Collection[str] | None = None, columns: int = 7
) -> Figure:
    """Draw aligned pairs one below the other.

    Args:
        pairs: from `align`; one with the caption of the pair above it does not repeat it.
        smooth: blend from patch to patch instead of showing their edges.
        words: the words to draw, as written in `Caption.text`; None draws all.
        columns: panels in a row, the image itself included.

    Raises:
        ValueError: no pairs.
    """
    if not pairs:
        raise ValueError("pairs is empty; expected at least one aligned pair")
    blocks = [_Block(pair, above, words, columns) for above, pair in zip([None, *pairs], pairs, strict=False)]
    width = 2 * _MARGIN + columns * _PANEL + (columns - 1) * _GAP
    height = _MARGIN + sum(block.height for block in blocks) + _LINE + _MARGIN
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    font = _families("".join(pair.title + pair.caption.text for pair in pairs))
    canvas = _Canvas(figure, width, height, font)
    top = _MARGIN
    for block in blocks:
        block.draw(canvas, top, smooth)
        top += block.height
    legend = _LEGEND + (" Dashed: annotated boxes." if any(pair.boxes for pair in pairs) else "")
    canvas.write(_MARGIN, top + _LINE / 2, legend, size=7, color=_QUIET)
    return figure


def light(pair: AlignedPair, smooth: bool = False) -> Tensor:
    """How brightly each pixel is lit for each word, in [0, 1]: float32 [words, H, W].

    The square of a weight over the word's highest weight. Most patches lie between the lowest and the highest
    similarity of a word, and the square separates them from the highest. Pixels outside of all patches are 0.
    """
    height, width = pair.pixels.shape[:2]
    rows, columns = pair.weights.shape[1:]
    relative = (pair.weights / pair.weights.amax(dim=(1, 2), keepdim=True)).square()
    y, x = (torch.arange(size) + 0.5 for size in (height, width))
    y, x = y / pair.patch_size[0], x / pair.patch_size[1]
    if smooth:
        # Beyond the outermost centres, the outermost weights are repeated.
        grid = torch.meshgrid(y / rows * 2 - 1, x / columns * 2 - 1, indexing="ij")
        place = torch.stack((grid[1], grid[0]), dim=-1).expand(len(relative), -1, -1, -1)
        lit = torch.nn.functional.grid_sample(
            relative.unsqueeze(1), place, mode="bilinear", padding_mode="border", align_corners=False
        ).squeeze(1)
    else:
        lit = relative[:, y.long().clamp(max=rows - 1)][:, :, x.long().clamp(max=columns - 1)]
    return lit * ((y < rows)[:, None] & (x < columns))


class _Canvas:
    """A figure on which places are inches from the top left."""

    def __init__(self, figure: Figure, width: float, height: float, font: list[str]) -> None:
        self.figure, self.width, self.height, self.font = figure, width, height, font

    def write(self, left: float, top: float, text: str, **style: Any) -> None:
        # Without parse_math, "$5 and $6" would become a formula.
        self.figure.text(
            left / self.width,
            1 - top / self.height,
            text,
            **{"parse_math": False, "family": self.font, "va": "center", "color": _INK, **style},
        )

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        bottom = 1 - (top + height) / self.height
        axes = self.figure.add_axes((left / self.width, bottom, width / self.width, height / self.height))
        axes.set_axis_off()
        return axes


class _Block:
    """One pair: caption, image, and a panel for every word."""

    def __init__(
        self, pair: AlignedPair, above: AlignedPair | None, words: Collection[str] | None, columns: int
    ) -> None:
        self.pair, self.columns = pair, columns
        read = pair.caption.read
        self.shown = [i for i, word in enumerate(read) if words is None or pair.caption[word] in words]
        self.header: list[str] = []
        if above is None or above.caption != pair.caption:
            self.header = _wrap(pair.caption.text, columns)
        self.space = _LINE if self.header and above else 0
        self.notice = ""
        if len(read) < len(pair.caption.words):
            self.notice = f"The model's context ends after {len(read)} of {len(pair.caption.words)} words."
        self.panel_height = _PANEL * pair.pixels.shape[0] / pair.pixels.shape[1]
        self.rows = math.ceil((1 + len(self.shown)) / columns)

    @property
    def height(self) -> float:
        lines = len(self.header) + bool(self.notice)
        return self.space + lines * _LINE + 0.08 * bool(lines) + self.rows * (_LABEL + self.panel_height + _GAP)

    def draw(self, canvas: _Canvas, top: float, smooth: bool) -> None:
        top += self.space
        for line in self.header:
            canvas.write(_MARGIN, top + _LINE / 2, line, size=10.5)
            top += _LINE
        if self.notice:
            canvas.write(_MARGIN, top + _LINE / 2, self.notice, size=8.5, color=_NOTICE)
            top += _LINE
        top += 0.08 * bool(self.header or self.notice)
        pixels = self.pair.pixels / 255
        axes = self._panel(canvas, top, 0, pixels, self.pair.title or "image", "", weight="bold")
        for box, _ in self.pair.boxes:
            _outline(axes, box)
        lit = light(self.pair, smooth).numpy()
        for place, index in enumerate(self.shown, start=1):
            word = self.pair.caption.read[index]
            brightness = 0.1 + 0.9 * lit[index, :, :, None]
            panel = pixels * brightness + np.array(_NIGHT) * (1 - brightness)
            axes = self._panel(canvas, top, place, panel, self.pair.caption[word], _percent(self.pair.kept[index]))
            self._frame_highest(axes, self.pair.weights[index])
            for box, words in self.pair.boxes:
                if index in words:
                    _outline(axes, box)

    def _frame_highest(self, axes: Axes, weights: Tensor) -> None:
        highest = (weights == weights.max()).nonzero().tolist()
        if len(highest) == 1:
            height, width = self.pair.patch_size
            row, column = highest[0]
            corner = (column * width - 0.5, row * height - 0.5)  # pixel centres are whole numbers
            axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=_MARK, linewidth=0.9))

    def _panel(
        self, canvas: _Canvas, top: float, place: int, pixels: np.ndarray, label: str, note: str, **style: Any
    ) -> Axes:
        row, column = divmod(place, self.columns)
        left = _MARGIN + column * (_PANEL + _GAP)
        top += row * (_LABEL + self.panel_height + _GAP)
        shown = label if _display_width(label) <= _LETTERS else label[: _LETTERS * 2 // 3] + "…"
        size = min(9.5, 9.5 * 12 / max(_display_width(shown), 1))
        canvas.write(left, top + _LABEL - 0.12, shown, size=size, **style)
        canvas.write(left + _PANEL, top + _LABEL - 0.12, note, size=7, color=_QUIET, ha="right")
        axes = canvas.axes(left, top + _LABEL, _PANEL, self.panel_height)
        axes.set_label(label)
        axes.imshow(pixels, aspect="auto")
        return axes


def _outline(axes: Axes, box: Box) -> None:
    """Draw an annotated box; pixel centres are whole numbers."""
    left, top, right, bottom = box
    corner = (left - 0.5, top - 0.5)
    axes.add_patch(
        Rectangle(corner, right - left, bottom - top, fill=False, edgecolor=_BOX, linewidth=0.9, linestyle="--")
    )


def _wrap(text: str, columns: int) -> list[str]:
    # In this font a letter is about 0.085 inches wide, and a Chinese one twice as wide.
    letters = int(columns * (_PANEL + _GAP) / 0.085)
    widest = max(_display_width(text) / max(len(text), 1), 1)
    return textwrap.wrap(text, max(int(letters / widest), 1)) or [""]


def _percent(share: Tensor) -> str:
    return ">99%" if 0.995 <= share < 1 else f"{share:.0%}"


def _display_width(text: str) -> int:
    return sum(
        0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        for letter in text
    )


def _families(text: str) -> list[str]:
    """Installed font families that together have the letters of `text`, as far as possible; matplotlib's own first."""
    families, missing = [_FONT], {letter for letter in text if not letter.isspace()}
    missing -= _letters(font_manager.findfont(_FONT))
    for font in font_manager.fontManager.ttflist if missing else ():
        # matplotlib's own last resort has a box for every letter.
        found = set() if font.name.startswith("Last Resort") else missing & _letters(font.fname)
        if found:
            families.append(font.name)
            missing -= found
        if not missing:
            break
    # A variation selector or a joiner has no shape of its own.
    missing = {letter for letter in missing if unicodedata.category(letter) not in ("Mn", "Cf")}
    if missing:
        logging.warning(
            f"no installed font has the letters {''.join(sorted(missing))!r}; the figure shows boxes instead. "
            "Install one, such as Noto Sans, or write a page (.html)"
        )
    return families


def _letters(path: str) -> set[str]:
    return set(map(chr, font_manager.get_font(path).get_charmap()))
