"""How losses plug into open_clip's training: the contract, its discovery, our own plug-in, the hooks."""
