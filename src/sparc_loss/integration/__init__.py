"""Old name of `sparc_loss.plugins`; its documented module `plugin` is kept for one release."""
