"""The study's training loop, on a model and a loss that only record what they are given."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from examples.study.plan import LEARNING_RATES, SIZES, Run
from examples.study.training import train

pytestmark = pytest.mark.slow

STEPS = 20
SIZE = replace(SIZES["tiny"], scratch_steps=STEPS, batch_size=3, warmup=4)
# Ten pairs: image i has the value i, and text i is the token i.
IMAGES = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 2, 2)
TEXTS = torch.arange(10).view(10, 1)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(10.0))
        self.matrix = nn.Parameter(torch.ones(2, 2))

    def forward(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        return {"patch_features": images, "texts": texts, "total": self.matrix.sum() + self.logit_scale}


class Loss(nn.Module):
    """Its value is the number of the step."""

    def __init__(self) -> None:
        super().__init__()
        self.fine_grained_weight = 0.3
        self.weights, self.images, self.texts = [], [], []

    def forward(self, patch_features: Tensor, texts: Tensor, total: Tensor) -> Tensor:
        self.weights.append(self.fine_grained_weight)
        self.images.append((255 * patch_features[:, 0, 0, 0]).round().long().tolist())
        self.texts.append(texts[:, 0].tolist())
        return len(self.weights) + total - total.detach()


@pytest.fixture
def updates(monkeypatch) -> list[dict]:
    """What each update used: rate and decay of the group whose first parameter has so many axes, and the gradients."""
    recorded = []

    class Recording(torch.optim.AdamW):
        def step(self, *arguments):
            recorded.append(
                {group["params"][0].ndim: (group["lr"], group["weight_decay"]) for group in self.param_groups}
                | {
                    "gradients": [
                        each.grad.unique().tolist() for group in self.param_groups for each in group["params"]
                    ]
                }
            )
            return super().step(*arguments)

    monkeypatch.setattr(torch.optim, "AdamW", Recording)
    return recorded


def trained(model: Model | None = None, **changes) -> tuple[float, Loss]:
    run = replace(Run("SPARC", "scratch", "mean", 0, "sparc"), **changes)
    loss = Loss()
    return train(model or Model(), loss, run, SIZE, IMAGES, TEXTS, lambda images: images), loss


def test_every_text_goes_with_its_image():
    _, loss = trained()
    assert loss.images == loss.texts


def test_no_pair_returns_before_the_others_have_been():
    _, loss = trained()
    for epoch in range(STEPS // 3):
        seen = [text for batch in loss.texts[3 * epoch : 3 * epoch + 3] for text in batch]
        assert len(seen) == len(set(seen)) == 9


def test_batches_are_those_of_the_seed():
    batches = [
        trained(seed=seed, family=family)[1].texts for seed, family in ((0, "sparc"), (0, "filip"), (1, "sparc"))
    ]
    assert batches[0] == batches[1] != batches[2]


def test_shuffled_shows_another_pairs_image():
    _, loss = trained(shuffled=True)
    assert all(images == texts[-1:] + texts[:-1] for images, texts in zip(loss.images, loss.texts, strict=True))


def test_the_fine_grained_half_begins_after_its_delay():
    assert trained(delay=0.6)[1].weights == [0.0] * 12 + [0.3] * 8
    assert trained()[1].weights == [0.3] * STEPS


def test_the_rate_rises_and_decays_by_a_cosine(updates):
    trained()
    rises = [(step + 1) / 4 for step in range(4)]
    decays = [(1 + math.cos(math.pi * step / 16)) / 2 for step in range(16)]
    assert [each[2][0] / LEARNING_RATES["scratch"] for each in updates] == pytest.approx(rises + decays)


def test_only_matrices_decay(updates):
    trained()
    assert {each[2][1] for each in updates} == {0.1}
    assert {each[0][1] for each in updates} == {0.0}


def test_gradients_are_those_of_the_step_alone(updates):
    trained()
    assert all(each["gradients"] == [[1.0], [1.0]] for each in updates)


def test_the_scale_is_at_most_a_hundred():
    model = Model()
    trained(model)
    assert model.logit_scale.item() <= math.log(100)


def test_the_loss_reported_is_that_of_the_last_tenth():
    assert trained()[0] == pytest.approx((STEPS - 1 + STEPS) / 2)
