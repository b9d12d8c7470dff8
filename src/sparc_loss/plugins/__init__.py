"""Loss plug-ins of open_clip: the contract, their discovery by entry point, and our objectives."""
