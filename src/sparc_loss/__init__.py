"""SPARC's fine-grained image-text loss for open_clip (arXiv 2401.09865).

`SparcLoss` is the objective. `surface_embeddings` makes an open_clip model return the loss's inputs, and `restore`
undoes it. `sparc_loss.functional` has one function per equation. Everything is imported when it is first used: the
loss needs torch and einops, `surface_embeddings` also open_clip, and `sparc-loss --help` neither.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparc_loss.embeddings import restore, surface_embeddings
    from sparc_loss.losses import SparcLoss

__all__ = ["SparcLoss", "restore", "surface_embeddings"]
__version__ = "0.1.0"

# `import sparc_loss` alone gives these, too.
_MODULES = ("diagnostics", "functional", "fused", "losses")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name == "SparcLoss":
        from sparc_loss.losses import SparcLoss

        return SparcLoss
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
    return sorted({*globals(), *__all__, *_MODULES})
