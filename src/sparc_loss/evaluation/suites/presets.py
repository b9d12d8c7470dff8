"""The protocols behind the published tables of segmentation, as their authors' configuration files have them.

    plain      CLIP's own last layer, in ClearCLIP's windows (its `clearclip_segmentor.py`)
    maskclip   the values of the last block, in the same windows
    clearclip  ClearCLIP (`configs/` of mc-lan/ClearCLIP)
    sclip      SCLIP (`configs/` of wangf3014/SCLIP)

All offer every class to every image and use OpenAI's 80 prompts. A table that gives plain CLIP or MaskCLIP on sets
with background does not say below which probability a pixel is background; 0.2 is ours there.
"""

from collections.abc import Mapping
from dataclasses import replace

from sparc_loss.evaluation.protocol import PRESETS, Protocol
from sparc_loss.evaluation.suites.suite import Names


def presets(
    classes: Names,
    sclip_classes: Names | None = None,
    *,
    window: int = 448,
    sclip_side: int = 336,
    background: Names | None = None,
    sclip_background: Names | None = None,
    clear_threshold: float = 0.0,
    sclip_scale: float = 40.0,
    sclip_area: float = 0.0,
) -> Mapping[str, Protocol]:
    """The four protocols of one suite.

    Args:
        classes: names of ClearCLIP's configuration.
        sclip_classes: names of SCLIP's; None is the same.
        window: of ClearCLIP's.
        sclip_side: short side of SCLIP's.
        background: names of background; None is a data set without.
        sclip_background: SCLIP's; None is the same.
        clear_threshold: probability below which a pixel is background, in ClearCLIP's.
        sclip_scale: SCLIP's factor of the cosines.
        sclip_area: SCLIP's minimal area.
    """
    of_background = sum(background or (), ())
    clear = Protocol(
        classes, 448, window, 224, "clear", background=of_background, background_threshold=clear_threshold
    )
    plain = replace(clear, reading="last", background_threshold=0.2 if background else 0.0)
    sclip = Protocol(
        sclip_classes or classes,
        sclip_side,
        224,
        112,
        "self",
        logit_scale=sclip_scale,
        background=sum(sclip_background or background or (), ()),
        background_threshold=0.1 if background else 0.0,
        minimal_area=sclip_area,
    )
    return dict(zip(PRESETS, (plain, replace(plain, reading="value"), clear, sclip), strict=True))
