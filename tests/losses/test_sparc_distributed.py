"""Several real processes do together what one process does on the whole batch."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from torch.testing import assert_close
from toy_training import LENGTHS, LinearModel, Setting, output, train_every_way, train_step, whole_batch

from sparc_loss import SparcLoss
from sparc_loss.functional import countable_tokens, image_contrastive_loss

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
# Contrasted on each rank with the rank's own images.
NEGATIVES = {f"{lengths}, image negatives": Setting(lengths, image_negatives=2) for lengths in LENGTHS}


@pytest.fixture(scope="module", params=[2, 3], ids=lambda number: f"{number} ranks")
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict]]:
    """For each rank, what it made of each setting."""
    settings = SETTINGS | ACCUMULATED | NEGATIVES | (SHARDED if SHARDS_ON_CPU else {})
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


@pytest.mark.parametrize("name", NEGATIVES)
def test_image_negatives_on_ranks_equal_one_process_that_contrasts_within_each_ranks_part(
    ranks: list[dict[str, dict]], name: str
) -> None:
    batch, model = whole_batch(NEGATIVES[name].lengths, len(ranks)), LinearModel(siglip=False)
    outputs = output(model, batch)
    captions = countable_tokens(
        *(outputs[key] for key in ("token_features", "patch_features", "token_mask")),
        region_mask=outputs["region_mask"],
    ).any(dim=1)
    total = SparcLoss()(**outputs)
    local = ("patch_features", "token_features", "token_mask", "region_mask")
    for part in torch.arange(len(captions)).chunk(len(ranks)):
        patches, tokens, mask, regions = (outputs[key][part] for key in local)
        loss = image_contrastive_loss(patches, tokens, mask, outputs["logit_scale"], 2, region_mask=regions)
        total = total + loss * captions[part].sum() / captions.sum().clamp(min=1)
    total.backward()
    assert_close(sum(each[name]["loss"] for each in ranks) / len(ranks), total.detach(), rtol=1e-10, atol=1e-10)
    for parameter, value in model.named_parameters():
        for each in ranks:
            assert_close(each[name][parameter], value.grad, rtol=1e-10, atol=1e-10)


def test_accumulated_parts_contrast_with_the_images_of_the_whole_batch() -> None:
    setting = Setting("very different lengths", wrapper="none", accum_freq=3, image_negatives=4)
    result = train_step(setting, whole_batch(setting.lengths, 2))
    assert_close(result["loss"], on_one_process(setting, 2)["loss"], rtol=1e-10, atol=1e-10)
    assert_accumulated(result, on_one_process(setting, 2), setting.accum_freq)


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


def test_a_single_rank_under_ddp_is_one_process(tmp_path_factory: pytest.TempPathFactory) -> None:
    setting = Setting("very different lengths")
    (result,) = run_ranks(train_every_way, 1, tmp_path_factory.mktemp("rank"), {"alone": setting})
    for name, value in on_one_process(setting, 1).items():
        assert_close(result["alone"][name], value, rtol=1e-10, atol=1e-10)


def test_the_parts_of_a_batch_differ_so_that_a_local_mean_would_show() -> None:
    """The captions of the ranks have different numbers of tokens, without which most mistakes would pass."""
    mask = whole_batch("very different lengths", 3)["token_mask"]
    assert len({int(part.sum()) for part in torch.chunk(mask, 3)}) == 3
