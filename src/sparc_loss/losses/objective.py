"""The base class of all objectives: open_clip's own loss and a fine-grained term, each with its weight."""

import inspect
from functools import reduce
from operator import add
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from sparc_loss._checks import check_features, check_number, check_positive, check_scale, check_whole_number
from sparc_loss.losses.outputs import ModelOutputs


class GlobalLossArguments(TypedDict, total=False):
    """The arguments of every objective about its global loss, with open_clip's names and defaults; see `Objective`."""

    global_loss: nn.Module | None
    local_loss: bool
    gather_with_grad: bool
    cache_labels: bool
    rank: int
    world_size: int


class Objective(nn.Module):
    """global_weight times open_clip's own loss, plus fine_grained_weight times the fine-grained term of a subclass.

    A subclass implements `fine_grained_term` so that over W ranks the gradient that DistributedDataParallel averages
    equals that of one process on the whole batch, if each rank has the same number of pairs. An objective has no
    parameters, because open_clip optimises the parameters of the model only.

    With `world_size > 1` the loss uses collective operations, as ClipLoss does. Every rank must call it at every step,
    with as many pairs as the others. A call on one rank only, such as a validation loss on rank 0, never returns. Use
    a second loss with `world_size=1` for it. When one rank runs out of data, the calls of the others never return, not
    even inside `torch.distributed.algorithms.Join`. Drop the last incomplete batch on every rank.

    Args:
        global_weight: scales the `contrastive_loss` of the global loss. 0 skips its computation.
        fine_grained_weight: scales the fine-grained term. 0 skips its computation.
        fine_grained_scale: 1/tau of the fine-grained term; None shares the model's learned `logit_scale`.
        global_loss: a module called like open_clip's losses and returning a dict with `contrastive_loss`, such as
            SigLipLoss or CoCaLoss; its other terms are passed through unweighted. None creates a ClipLoss.
        local_loss, gather_with_grad, cache_labels, rank, world_size: as in open_clip's ClipLoss.

    Raises:
        TypeError: a weight or scale that is not a number, a world_size that is not whole, a `global_loss` that is no
            module.
        ValueError: a negative weight, a scale not above 0, a world_size below 1; `world_size > 1` without
            `gather_with_grad=True`, or a `global_loss` of another world_size.
        ImportError: `global_loss` is None and open_clip is not installed.
    """

    further_inputs: tuple[str, ...] = ()
    """Names of the model's outputs that the objective uses beyond `forward`'s named arguments."""
    settings: tuple[str, ...] = ("global_weight", "fine_grained_weight", "fine_grained_scale")
    """Names of the attributes that `print(loss)` shows."""
    __signature__: inspect.Signature

    def __init_subclass__(cls) -> None:
        """Show the shared arguments in `help()` and in a notebook's completion, too."""
        super().__init_subclass__()
        own = [each for name, each in inspect.signature(cls.__init__).parameters.items() if name != "self"]
        if own and own[-1].name == "shared":
            every = inspect.signature(Objective.__init__).parameters
            names = GlobalLossArguments.__annotations__
            shared = [every[name].replace(kind=inspect.Parameter.KEYWORD_ONLY) for name in names]
            cls.__signature__ = inspect.Signature([*own[:-1], *shared])

    def __init__(
        self,
        global_weight: float,
        fine_grained_weight: float,
        fine_grained_scale: float | None,
        global_loss: nn.Module | None = None,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__()
        check_number("global_weight", global_weight, 0)
        check_number("fine_grained_weight", fine_grained_weight, 0)
        if fine_grained_scale is not None:
            check_positive("fine_grained_scale", fine_grained_scale)
        check_whole_number("world_size", world_size, 1)
        if global_loss is not None and not isinstance(global_loss, nn.Module):
            raise TypeError(
                f"global_loss is {global_loss!r} ({type(global_loss).__name__}); expected a module such as "
                "open_clip.loss.SigLipLoss(), or None for ClipLoss"
            )
        if world_size > 1 and not (gather_with_grad and getattr(global_loss, "gather_with_grad", True)):
            raise ValueError(
                f"gather_with_grad is False with world_size {world_size}; expected True: without it the global "
                f"loss's gradient is 1/{world_size} of one process's, and its ratio to the fine-grained one changes "
                "with the number of processes (local_loss may be either)"
            )
        global_world_size = getattr(global_loss, "world_size", world_size)
        if global_world_size != world_size:
            raise ValueError(
                f"global_loss has world_size {global_world_size}; "
                f"expected the same as {type(self).__name__}, {world_size}"
            )

        self.global_weight = global_weight
        self.fine_grained_weight = fine_grained_weight
        self.fine_grained_scale = fine_grained_scale
        self.world_size = world_size
        self.global_loss = global_loss or self._clip_loss()(
            local_loss=local_loss,
            gather_with_grad=gather_with_grad,
            cache_labels=cache_labels,
            rank=rank,
            world_size=world_size,
        )

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        patch_features: Tensor | None = None,
        token_features: Tensor | None = None,
        token_mask: Tensor | None = None,
        logit_bias: Tensor | None = None,
        patch_mask: Tensor | None = None,
        region_mask: Tensor | None = None,
        output_dict: bool = False,
        **others: Tensor,
    ) -> Tensor | dict[str, Tensor]:
        """Loss of a batch; the arguments are what a model from `surface_embeddings` returns in training mode.

        Args:
            image_features: [B, D], L2-normalised.
            text_features: [B, D], L2-normalised.
            logit_scale: 1/tau, one element (`model.logit_scale.exp()`).
            patch_features: [B, P, D], not normalised.
            token_features: [B, L, D], not normalised.
            token_mask: bool [B, L], True for valid tokens.
            logit_bias: one element or None, for SigLipLoss.
            patch_mask: bool [B, P] or None, False for padding patches.
            region_mask: bool [B, L, P] or None, True for the patches a token may use; SparcLoss only.
            output_dict: return the weighted terms by name instead of their sum.
            others: the model's further outputs: `further_inputs`, and those that `global_loss` uses.

        Returns:
            Scalar, or {"contrastive_loss": ..., "fine_grained_loss": ..., and the global loss's other terms},
            already weighted, whose sum is that scalar. The dictionary also has the entries of `diagnostics_of`, which
            are not terms.

        Raises:
            TypeError: features not floating point, a mask not bool; no patch_features, token_features or token_mask,
                which a model in evaluation mode does not return; outputs that `global_loss` does not take or lacks.
            ValueError: ranks, sizes or devices that disagree, no pair, a logit_scale of several elements.
        """
        if patch_features is None or token_features is None or token_mask is None:
            local = {"patch_features": patch_features, "token_features": token_features, "token_mask": token_mask}
            raise TypeError(
                f"{type(self).__name__} got no {', '.join(name for name, value in local.items() if value is None)}; "
                "expected the outputs of a model from sparc_loss.surface_embeddings in training mode (call "
                "model.train()): in evaluation mode it returns what open_clip returns"
            )
        check_features(
            "b c, b c, b p d, b l d",
            image_features=image_features,
            text_features=text_features,
            patch_features=patch_features,
            token_features=token_features,
        )
        if len(image_features) == 0:
            raise ValueError(f"image_features has shape {list(image_features.shape)}; expected at least one pair")
        check_scale(logit_scale)
        further = self._taken_from(others)
        terms = self._global_terms(image_features, text_features, logit_scale, logit_bias, others)
        outputs = ModelOutputs(
            image_features,
            text_features,
            logit_scale if self.fine_grained_scale is None else self.fine_grained_scale,
            patch_features,
            token_features,
            token_mask,
            patch_mask,
            region_mask,
            further,
        )
        if self.fine_grained_weight == 0:
            term = patch_features.new_zeros((), dtype=torch.float32) + zero_of(*further.values())
        else:
            term = self.fine_grained_weight * self.fine_grained_term(outputs)
        terms["fine_grained_loss"] = term
        terms.update(self.further_terms(outputs))
        return {**terms, **self.diagnostics_of(outputs)} if output_dict else reduce(add, terms.values())

    def fine_grained_term(self, outputs: ModelOutputs) -> Tensor:
        """The fine-grained loss before its weight, a scalar."""
        raise NotImplementedError

    def further_terms(self, outputs: ModelOutputs) -> dict[str, Tensor]:
        """Further weighted terms of the objective, by name."""
        return {}

    def diagnostics_of(self, outputs: ModelOutputs) -> dict[str, Tensor]:
        """Detached scalars to log beside the terms, by names that do not end in `_loss`; none here."""
        return {}

    def extra_repr(self) -> str:
        """The settings, for `print(loss)`."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self.settings)

    def _global_terms(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
        others: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        if self.global_weight == 0 and not others:
            return {"contrastive_loss": zero_of(image_features, text_features, logit_scale, logit_bias)}
        arguments = {
            "image_features": image_features,
            "text_features": text_features,
            "logit_scale": logit_scale,
            "output_dict": True,
            **others,
        }
        if logit_bias is not None:  # CoCaLoss and DistillClipLoss do not take one
            arguments["logit_bias"] = logit_bias
        if not torch.compiler.is_compiling():
            self._check_taken(arguments)
        terms = self.global_loss(**arguments)
        if not isinstance(terms, dict) or "contrastive_loss" not in terms:
            found = ", ".join(terms) if isinstance(terms, dict) else type(terms).__name__
            raise TypeError(f"global_loss returned {found}; expected a dict with contrastive_loss, as open_clip's do")
        if self.global_weight == 0:  # 0 times infinity is NaN
            return {**terms, "contrastive_loss": zero_of(image_features, text_features, logit_scale, logit_bias)}
        return {**terms, "contrastive_loss": self.global_weight * terms["contrastive_loss"]}

    def _check_taken(self, arguments: dict[str, Any]) -> None:
        """Raise TypeError where the global loss is of another kind of model."""
        try:
            inspect.signature(self.global_loss.forward).bind(**arguments)
        except TypeError as error:
            raise TypeError(
                f"global_loss is a {type(self.global_loss).__name__}, which the model's outputs do not fit ({error}); "
                "expected the one that open_clip.create_loss makes for the model: CoCaLoss for a CoCa, SigLipLoss for "
                "a model with a logit_bias, ClipLoss for others"
            ) from error

    def _taken_from(self, others: dict[str, Tensor]) -> dict[str, Tensor]:
        missing = [name for name in self.further_inputs if name not in others]
        if missing:
            raise TypeError(
                f"{type(self).__name__} got no {', '.join(missing)}; expected them among the model's outputs"
            )
        return {name: others.pop(name) for name in self.further_inputs}

    def _clip_loss(self) -> type[nn.Module]:
        try:
            from open_clip.loss import ClipLoss
        except ImportError as error:
            raise ImportError(
                f"{type(self).__name__}() uses open_clip's ClipLoss as its global loss, and open_clip cannot be "
                f"imported ({error}); pip install 'sparc-loss[train]', or pass global_loss"
            ) from error
        return ClipLoss


def zero_of(*used: Tensor | float | None) -> Tensor:
    """Zero, attached to all of these: DistributedDataParallel waits for the gradient of every parameter."""
    return 0 * reduce(add, (each.float().sum() for each in used if isinstance(each, Tensor)), torch.zeros(()))
