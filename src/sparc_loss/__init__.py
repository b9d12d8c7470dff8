"""SPARC's fine-grained image-text loss for open_clip (arXiv 2401.09865).

`SparcLoss` is the objective. `surface_embeddings` makes an open_clip model return the loss's inputs, and `restore`
undoes it. `sparc_loss.functional` has one function per equation. Importing this package needs torch and einops only;
open_clip is imported when a model is surfaced or a ClipLoss is created.
"""

from typing import TYPE_CHECKING, Any

from sparc_loss.losses import SparcLoss

if TYPE_CHECKING:
    from sparc_loss.embeddings import restore, surface_embeddings

__all__ = ["SparcLoss", "restore", "surface_embeddings"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in ("restore", "surface_embeddings"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from sparc_loss.embeddings import surface
    except ImportError as error:
        raise ImportError(
            f"sparc_loss.{name} needs open_clip, which cannot be imported ({error}); pip install 'sparc-loss[train]'"
        ) from error
    return getattr(surface, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
