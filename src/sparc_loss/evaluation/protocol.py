"""How a model segments the images of a benchmark: everything that changes its mean IoU, in one frozen object."""

from dataclasses import asdict, dataclass
from typing import Any

from sparc_loss._checks import check_choice, check_number, check_whole_number
from sparc_loss.embeddings.reading_names import READINGS, Reading

PRESETS = ("plain", "maskclip", "clearclip", "sclip")
"""The protocols of each suite of segmentation, see `sparc_loss.evaluation.suites.presets`."""
OFFERED = ("all", "present")
PROTOCOL_FIELDS = (
    "reading",
    "short_side",
    "window",
    "stride",
    "logit_scale",
    "background_threshold",
    "minimal_area",
    "classes_offered",
    "ignored_values",
)
"""The fields of a Protocol that an argument of the same name sets; `templates` and `classes` name files."""

# The longest side of a resized image in pixels, as mmsegmentation's configurations have it: (2048, short side).
_LONGEST_SIDE = 2048
# An image a hundred times as long as it is high would otherwise have no patch.
_SHORTEST_SIDE = 32


@dataclass(frozen=True)
class Protocol:
    """How a model segments images.

    Attributes:
        classes: the names of each class. Of several names of one class, the most probable one counts.
        short_side: of the resized image in pixels.
        window: height and width of a window in pixels; 0 is the whole image.
        stride: pixels from one window to the next.
        reading: of the patches, see `sparc_loss.embeddings.readings`.
        templates: prompts for the names, each with a "{}"; None is OpenAI's 80 for ImageNet.
        logit_scale: factor of the cosines before the softmax over all names.
        background: names of things that are no class; a pixel that resembles one of them is background.
        background_threshold: probability below which a pixel is background; 0 is none.
        minimal_area: a class with no larger share of an image's pixels of classes is taken out of it; 0 is none.
        classes_offered: "all", or "present": those of the image's mask, as SPARC's authors measure.
        ignored_values: values of the masks whose pixels are left out; None is those of the data set.
    """

    classes: tuple[tuple[str, ...], ...]
    short_side: int
    window: int
    stride: int
    reading: Reading = "last"
    templates: tuple[str, ...] | None = None
    logit_scale: float = 50.0
    background: tuple[str, ...] = ()
    background_threshold: float = 0.0
    minimal_area: float = 0.0
    classes_offered: str = "all"
    ignored_values: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_whole_number("short_side", self.short_side, 1)
        check_whole_number("window", self.window, 0)
        check_whole_number("stride", self.stride, 1)
        check_choice("reading", self.reading, READINGS)
        check_number("logit_scale", self.logit_scale, 0)
        check_number("background_threshold", self.background_threshold, 0, 1)
        check_number("minimal_area", self.minimal_area, 0, 1)
        check_choice("classes_offered", self.classes_offered, OFFERED)
        if any(not 0 <= value <= 255 for value in self.ignored_values or ()):
            raise ValueError(f"ignored_values is {list(self.ignored_values or ())}; expected values of 0 to 255")
        if self.window and self.stride > self.window:
            raise ValueError(
                f"stride is {self.stride}, window {self.window}; expected a stride no larger, or pixels are left out"
            )

    def image_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the resized image, for those of the file's."""
        scale = min(self.short_side / min(size), max(_LONGEST_SIDE, self.short_side) / max(size))
        least = min(self.short_side, _SHORTEST_SIDE)
        height, width = (max(least, int(side * scale + 0.5)) for side in size)
        return height, width

    def describe(self) -> str:
        """In a few words, for a table."""
        windows = f"windows of {self.window} every {self.stride}" if self.window else "whole image"
        prompts = "80 prompts" if self.templates is None else f"{len(self.templates)} prompts"
        parts = [f"short side {self.short_side}", windows, prompts, f"reading {self.reading}"]
        if self.background_threshold or self.minimal_area:
            parts.append(f"scale {self.logit_scale:g}")
        if self.background:
            parts.append(f"{len(self.background)} names of background")
        if self.background_threshold:
            parts.append(f"background below {self.background_threshold:g}")
        if self.minimal_area:
            parts.append(f"areas above {self.minimal_area:g}")
        if self.classes_offered != "all":
            parts.append("classes present only")
        if self.ignored_values is not None:
            parts.append(f"ignored {', '.join(map(str, self.ignored_values))}")
        return ", ".join(parts)

    def record(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)
