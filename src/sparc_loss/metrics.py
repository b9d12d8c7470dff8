"""Old name of `sparc_loss.diagnostics`."""

import warnings

from sparc_loss.diagnostics import alignment_diagnostics as alignment_metrics

__all__ = ["alignment_metrics"]

warnings.warn(f"{__name__} is now sparc_loss.diagnostics", DeprecationWarning, stacklevel=2)
