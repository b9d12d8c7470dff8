"""The learned heads of an objective as a submodule of the model, whose checkpoints still load in plain open_clip.

MGCA learns an attention and prototypes, FLAIR an attention and a bias, and open_clip optimises the model's parameters
only. So they become a submodule of the model, such as `mgca_heads`, and their outputs are added to the model's. But
the model's state_dict has no key for them, so that a checkpoint loads in plain open_clip. They are stored in its
`_metadata`, which PyTorch keeps and saves with a state_dict and which a model without heads ignores. `--resume` reads
them from there.

A state_dict that was copied into another dict has lost them: loading it into a model with heads fails and names the
missing keys. open_clip copies it where one process resumes a run of several. A checkpoint of another loss has none
either, and the state of the optimizer fits only the loss it comes from. The launcher refuses both before it starts
(`check_heads`). To change from one loss to another, start with `--pretrained`, not `--resume`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn


def add_heads(model: Any, name: str, make: Callable[[int], nn.Module]) -> Any:
    """Add a submodule to a surfaced model, and its outputs to the model's in training mode; returns the model.

    Args:
        model: from `surface_embeddings`.
        name: of the submodule.
        make: D, the size of all embeddings -> the heads, called with the model's outputs.
    """
    device = next(model.parameters()).device
    with torch.no_grad():
        tokens, _ = model.encode_tokens(torch.zeros(1, model.context_length, dtype=torch.long, device=device))
    heads = make(tokens.shape[-1]).to(device)
    heads.register_state_dict_post_hook(_move_to_metadata)
    heads.register_load_state_dict_pre_hook(_take_from_metadata)
    model.add_module(name, heads)
    model.register_forward_hook(partial(_with_outputs_of, name))
    return model


def check_heads(checkpoint: Mapping[str, Any], name: str | None, world_size: int, trains: bool = True) -> None:
    """Raise ValueError where a model with these heads could not resume from a checkpoint.

    Args:
        checkpoint: of open_clip's training, with the metadata of its state_dict; or a state_dict.
        name: of the submodule that the loss adds, such as "mgca_heads"; None if it adds none.
        world_size: number of processes that resume.
        trains: whether there is an optimizer, which takes its state from the checkpoint.
    """
    metadata = getattr(checkpoint.get("state_dict", checkpoint), "_metadata", {})
    found = {key.removeprefix("module."): key for key, entry in metadata.items() if "parameters" in entry}
    for other in found if trains and "optimizer" in checkpoint else ():
        if other != name:
            raise ValueError(f"has the parameters of {other}, which this loss has not; {_SAME_LOSS}")
    if name is not None and name not in found:
        raise ValueError(f"has no parameters of {name}; {_SAME_LOSS}")
    if name is not None and world_size == 1 and found[name].startswith("module."):
        raise ValueError(
            f"is of several processes, and open_clip would lose its parameters of {name} in one process; expected "
            "several processes again, or --pretrained, with which they are learned anew"
        )


_SAME_LOSS = "expected a checkpoint of a run with the same --loss, or --pretrained to change the loss"


def _with_outputs_of(name: str, model: Any, inputs: tuple, output: Any) -> Any:
    in_training = isinstance(output, dict) and "patch_features" in output
    return {**output, **getattr(model, name)(**output)} if in_training else output


def _move_to_metadata(heads: nn.Module, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    """Called after `state_dict` is filled. PyTorch keeps `local_metadata` as `state_dict._metadata[prefix]`."""
    names = [name for name in state_dict if name.startswith(prefix)]
    local_metadata["parameters"] = {name.removeprefix(prefix): state_dict.pop(name) for name in names}


def _take_from_metadata(heads: nn.Module, state_dict: dict, prefix: str, local_metadata: dict, *_: Any) -> None:
    """Called before `state_dict`, a copy of the caller's, is loaded. Without parameters, they are reported missing."""
    parameters = local_metadata.get("parameters", {})
    state_dict.update({f"{prefix}{name}": parameter for name, parameter in parameters.items()})
