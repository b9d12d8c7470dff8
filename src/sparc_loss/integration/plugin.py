"""Old name of `sparc_loss.plugins.contract` and `sparc_loss.plugins.discovery`."""

import warnings

from sparc_loss.plugins.contract import LossPlugin
from sparc_loss.plugins.discovery import PluginError, load_all_losses, load_loss, registered_losses

__all__ = ["LossPlugin", "PluginError", "load_all_losses", "load_loss", "registered_losses"]

warnings.warn(f"{__name__} is now sparc_loss.plugins.contract and .discovery", DeprecationWarning, stacklevel=2)
