"""See what each word of a caption selects of an image, as a figure or as a page. Needs the extra `show`."""

from sparc_loss.show.alignment import AlignedPair, align
from sparc_loss.show.figure import alignment_figure, draw
from sparc_loss.show.page import alignment_page

__all__ = ["AlignedPair", "align", "alignment_figure", "alignment_page", "draw"]
