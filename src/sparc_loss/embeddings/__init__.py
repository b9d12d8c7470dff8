"""Patch and token embeddings of open_clip models. Using its functions imports open_clip; importing it does not."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparc_loss.embeddings.surface import restore, surface_embeddings

__all__ = ["restore", "surface_embeddings"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sparc_loss.embeddings import surface

    return getattr(surface, name)
