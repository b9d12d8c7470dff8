"""The plug-in `--loss mgca`. The three functions are the contract of `sparc_loss.integration.plugin`.

MGCA learns an attention and prototypes, and open_clip optimises the model's parameters only: so they become the
model's submodule `mgca_heads`, and its output gets what they compute. But no key of theirs is in the model's
state_dict, so that a checkpoint loads in plain open_clip. They travel beside the keys, in the `_metadata` that PyTorch
keeps and saves with a state_dict and that a model without heads does not look at; `--resume` finds them there.

A state_dict that was copied into another dict has lost them: loading it into a model with heads fails, by the names of
the missing keys. open_clip does so where one process resumes what several have trained. A checkpoint of another loss
has none either, and the optimizer's state fits only the loss it comes from: to go from one loss to another, start
with `--pretrained`, not `--resume`.
"""

from argparse import ArgumentParser, Namespace
from typing import Any

import torch
from torch import nn

from sparc_loss.integration.shared import (
    add_group_with_weights,
    add_scale_and_tokens,
    check_flags,
    launched,
    number,
    shared_settings,
    surfaced,
)
from sparc_loss.losses import MgcaHeads, MgcaLoss


def add_arguments(parser: ArgumentParser) -> None:
    """Add the `--mgca-*` flags in a group of their own."""
    group = add_group_with_weights(
        parser, "mgca", "MGCA", "Token and prototype alignment (arXiv 2210.06044).", global_weight=1.0
    )
    group.add_argument(
        "--mgca-prototype-weight",
        type=number(minimum=0),
        default=1.0,
        metavar="X",
        help="weight of the prototype alignment (default: %(default)s)",
    )
    add_scale_and_tokens(group, "mgca")


def check_args(args: Namespace) -> None:
    """Refuse what cannot be trained before anything is written; see `sparc_loss.integration.shared.check_flags`.

    Raises:
        ValueError: --fsdp.
    """
    check_flags(args, "mgca")
    if getattr(args, "fsdp", False):
        raise ValueError(
            "--fsdp is set; expected it off with --loss mgca: FSDP2 gathers a checkpoint into a new dict, and what "
            "travels beside the keys, MGCA's own parameters, would be lost"
        )


def prepare_model(model: nn.Module, args: Namespace) -> nn.Module:
    """Surface the model's patch and token embeddings and add `mgca_heads`; see `sparc_loss.integration.shared`."""
    if not launched():
        check_args(args)
    return add_heads(surfaced(model, args, "mgca"))


def create_loss(args: Namespace) -> MgcaLoss:
    """MgcaLoss around the loss that open_clip makes from the same flags."""
    return MgcaLoss(prototype_weight=args.mgca_prototype_weight, **shared_settings(args, "mgca"))


def add_heads(model: nn.Module) -> nn.Module:
    """Give a surfaced model the submodule `mgca_heads` and, in training mode, its outputs. Returns the same object."""
    device = next(model.parameters()).device
    with torch.no_grad():
        tokens, _ = model.encode_tokens(torch.zeros(1, model.context_length, dtype=torch.long, device=device))
    heads = MgcaHeads(embed_dim=tokens.shape[-1]).to(device)
    heads.register_state_dict_post_hook(_move_to_metadata)
    heads.register_load_state_dict_pre_hook(_take_from_metadata)
    model.mgca_heads = heads
    model.register_forward_hook(_with_heads_outputs)
    return model


def _with_heads_outputs(model: nn.Module, inputs: tuple, output: Any) -> Any:
    in_training = isinstance(output, dict) and "patch_features" in output
    return {**output, **model.mgca_heads(**output)} if in_training else output


def _move_to_metadata(heads: nn.Module, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    """After `state_dict` is filled. PyTorch keeps `local_metadata` as `state_dict._metadata[prefix]`."""
    names = [name for name in state_dict if name.startswith(prefix)]
    local_metadata["parameters"] = {name.removeprefix(prefix): state_dict.pop(name) for name in names}


def _take_from_metadata(heads: nn.Module, state_dict: dict, prefix: str, local_metadata: dict, *_: Any) -> None:
    """Before `state_dict` is loaded, which is a copy of the caller's. Where there are none, they count as missing."""
    parameters = local_metadata.get("parameters", {})
    state_dict.update({f"{prefix}{name}": parameter for name, parameter in parameters.items()})
