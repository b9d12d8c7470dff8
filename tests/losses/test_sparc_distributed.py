"""Several real processes do together what one process does on the whole batch."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from torch.testing import assert_close
from toy_training import LENGTHS, LinearModel, Setting, train_every_way, train_step, whole_batch

from sparc_loss.functional import image_contrastive_loss

pytestmark = pytest.mark.slow

# SigLipLoss knows no local_loss.
LOSSES = [("ClipLoss", False), ("ClipLoss", True), ("SigLipLoss", False)]
SETTINGS = {
    f"{lengths}, {loss}{', local_loss' if local_loss else ''}, {reduction}": Setting(
        lengths, loss, local_loss, reduction
    )
    for lengths, (loss, local_loss), reduction in product(LENGTHS, LOSSES, ("token", "sample"))
}
SHARDED = {f"{lengths}, FSDP2": Setting(lengths, wrapper="FSDP2") for lengths in LENGTHS}
# torch 2.6 shards on GPUs only.
SHARDS_ON_CPU = hasattr(torch.cpu.Stream, "record_event")
ACCUMULATED = {
    f"{lengths}, {reduction}, accum_freq 3": Setting(lengths, reduction=reduction, accum_freq=3)
    for lengths, reduction in product(LENGTHS, ("token", "sample"))
}
CONTRASTED = {
    f"{lengths}, {reduction}, image_negatives 2, {direction}, accum_freq {accum_freq}": Setting(
        lengths,
        reduction=reduction,
        accum_freq=accum_freq,
        image_negatives=2,
        image_contrastive_direction=direction,
    )
    for lengths, reduction, direction, accum_freq in [
        *product(LENGTHS, ("token", "sample"), ("text_to_image",), (1,)),
        ("very different lengths", "token", "text_to_image", 3),
        ("very different lengths", "token", "both", 1),
        ("very different lengths", "sample", "both", 3),
    ]
}


@pytest.fixture(scope="module", params=[2, 3], ids=lambda number: f"{number} ranks")
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict]]:
    """For each rank, what it made of each setting."""
    settings = SETTINGS | ACCUMULATED | CONTRASTED | (SHARDED if SHARDS_ON_CPU else {})
    return run_ranks(train_every_way, request.param, tmp_path_factory.mktemp("ranks"), settings)


def on_one_process(setting: Setting, world_size: int) -> dict[str, Tensor]:
    return train_step(replace(setting, wrapper="none", accum_freq=1), whole_batch(setting.lengths, world_size))


def assert_equal_one_process(ranks: list[dict[str, dict]], name: str, setting: Setting) -> None:
    expected = on_one_process(setting, len(ranks))
    results = [result[name] for result in ranks]
    mean_loss = sum(result["loss"] for result in results) / len(ranks)
    assert_close(mean_loss, expected.pop("loss"), rtol=1e-10, atol=1e-10)
    for parameter, gradient in expected.items():
        for result in results:
            assert_close(result[parameter], gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", SETTINGS)
def test_ranks_equal_one_process(ranks: list[dict[str, dict]], name: str) -> None:
    assert_equal_one_process(ranks, name, SETTINGS[name])


@pytest.mark.skipif(not SHARDS_ON_CPU, reason="this torch shards on GPUs only")
@pytest.mark.parametrize("name", SHARDED)
def test_ranks_that_shard_the_parameters_equal_one_process(ranks: list[dict[str, dict]], name: str) -> None:
    assert_equal_one_process(ranks, name, SHARDED[name])


def assert_accumulated(result: dict[str, Tensor], expected: dict[str, Tensor], accum_freq: int) -> None:
    for parameter, gradient in expected.items():
        if parameter != "loss":
            # open_clip's loop goes back through the scale once for every part.
            times = accum_freq if parameter == "logit_scale" else 1
            assert_close(result[parameter], times * gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ACCUMULATED)
def test_accumulated_parts_equal_one_batch_of_their_size(name: str) -> None:
    setting = replace(ACCUMULATED[name], wrapper="none")
    result = train_step(setting, whole_batch(setting.lengths, 2))
    assert_close(result["loss"], on_one_process(setting, 2)["loss"], rtol=1e-10, atol=1e-10)
    assert_accumulated(result, on_one_process(setting, 2), setting.accum_freq)


@pytest.mark.parametrize("name", ACCUMULATED)
def test_accumulated_parts_on_many_ranks_equal_one_process(ranks: list[dict[str, dict]], name: str) -> None:
    expected = on_one_process(ACCUMULATED[name], len(ranks))
    for result in ranks:
        assert_accumulated(result[name], expected, ACCUMULATED[name].accum_freq)


def contrasted_on_one_process(setting: Setting, world_size: int) -> dict[str, Tensor]:
    """As `on_one_process`, where each caption is contrasted with other images of its rank's part of the batch."""
    batch = whole_batch(setting.lengths, world_size)
    plain = train_step(replace(setting, wrapper="none", accum_freq=1, image_negatives=0), batch)
    model = LinearModel(siglip=False)
    parts, numbers = [], []
    for index in range(world_size):
        part = {name: value.chunk(world_size)[index] for name, value in batch.items()}
        output = model(part["images"], part["texts"])
        masks = {name: part[name] for name in ("token_mask", "region_mask")}
        features = {name: output[name] for name in ("patch_features", "token_features", "logit_scale")}
        options = {"reduction": setting.reduction, "direction": setting.image_contrastive_direction}
        parts.append(image_contrastive_loss(**features, **masks, image_negatives=2, **options))
        counts = (part["token_mask"][..., None] & part["region_mask"]).any(dim=2).any(dim=1).sum()
        numbers.append(counts if setting.reduction == "token" else torch.tensor(1))
    term = sum(loss * number for loss, number in zip(parts, numbers, strict=True)) / max(sum(numbers), 1)
    term.backward()
    return {
        "loss": plain["loss"] + term.detach(),
        **{name: plain[name] + parameter.grad for name, parameter in model.named_parameters()},
    }


@pytest.mark.parametrize("name", CONTRASTED)
def test_ranks_contrast_with_their_own_images_and_average_over_the_captions_of_all(
    ranks: list[dict[str, dict]], name: str
) -> None:
    setting, expected = CONTRASTED[name], contrasted_on_one_process(CONTRASTED[name], len(ranks))
    results = [result[name] for result in ranks]
    mean_loss = sum(result["loss"] for result in results) / len(ranks)
    assert_close(mean_loss, expected["loss"], rtol=1e-10, atol=1e-10)
    for result in results:
        assert_accumulated(result, expected, setting.accum_freq)


def test_the_contrast_with_other_images_changes_the_gradient_of_every_rank(ranks: list[dict[str, dict]]) -> None:
    name = "very different lengths, token, image_negatives 2, text_to_image, accum_freq 1"
    plain = on_one_process(replace(CONTRASTED[name], image_negatives=0), len(ranks))
    for result in ranks:
        assert (result[name]["image.weight"] - plain["image.weight"]).abs().max() > 1e-3


def test_accumulated_parts_contrast_as_one_batch_of_their_size() -> None:
    """The images of the other parts are negatives too: each part alone here has one image, and no negative."""
    setting = Setting("very different lengths", wrapper="none", accum_freq=6, image_negatives=2)
    result, expected = train_step(setting, whole_batch(setting.lengths, 2)), on_one_process(setting, 2)
    assert_close(result["loss"], expected["loss"], rtol=1e-10, atol=1e-10)
    assert_accumulated(result, expected, setting.accum_freq)


def test_a_single_rank_under_ddp_is_one_process(tmp_path_factory: pytest.TempPathFactory) -> None:
    setting = Setting("very different lengths")
    (result,) = run_ranks(train_every_way, 1, tmp_path_factory.mktemp("rank"), {"alone": setting})
    for name, value in on_one_process(setting, 1).items():
        assert_close(result["alone"][name], value, rtol=1e-10, atol=1e-10)


def test_the_parts_of_a_batch_differ_so_that_a_local_mean_would_show() -> None:
    """The captions of the ranks have different numbers of tokens, without which most mistakes would pass."""
    mask = whole_batch("very different lengths", 3)["token_mask"]
    assert len({int(part.sum()) for part in torch.chunk(mask, 3)}) == 3
