"""How every head is trained: AdamW, a tenth of the steps to warm up, cosine decay."""

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

_WEIGHT_DECAY = 1e-4
_LARGEST_GRADIENT = 1.0


class Optimisation:
    """AdamW over modules that each have a learning rate of their own.

    Args:
        modules: module -> its learning rate; only parameters that require gradients are trained.
        steps: in all.
    """

    def __init__(self, modules: dict[nn.Module, float], steps: int) -> None:
        groups = [
            {"params": [each for each in module.parameters() if each.requires_grad], "lr": rate}
            for module, rate in modules.items()
        ]
        self.parameters = [each for group in groups for each in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=_WEIGHT_DECAY)
        self.schedule = OneCycleLR(
            self.optimizer, [group["lr"] for group in groups], steps, pct_start=0.1, cycle_momentum=False
        )

    def step(self, loss: Tensor) -> None:
        """One update.

        Raises:
            ValueError: a loss that is not finite.
        """
        if not loss.isfinite():
            raise ValueError(f"the loss is {loss.item()}; expected a finite number: a smaller --lr")
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, _LARGEST_GRADIENT)
        self.optimizer.step()
        self.schedule.step()


def training_order(number: int, steps: int, batch_size: int, seed: int) -> list[int]:
    """The indices of the images of all steps, one permutation after another; every seed has its own order."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < steps * batch_size:
        order += torch.randperm(number, generator=generator).tolist()
    return order[: steps * batch_size]
