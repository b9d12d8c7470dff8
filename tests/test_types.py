"""The types of the public interface, as a type checker sees them from a user's file."""

from pathlib import Path

import pytest
from mypy import api

pytestmark = pytest.mark.slow  # a minute of its own where nothing is cached

USER_FILE = """
from torch import Tensor, nn
from typing_extensions import assert_type

from sparc_loss import SparcLoss, restore, surface_embeddings
from sparc_loss.functional import fine_grained_loss
from sparc_loss.losses import FilipLoss


def train(model: nn.Linear, tokenizer: object, features: dict[str, Tensor]) -> None:
    assert_type(surface_embeddings(model, tokenizer, tokens="all"), nn.Linear)
    assert_type(restore(model), nn.Linear)
    loss = SparcLoss(0.5, threshold=0.1, alignment="dense", reduction="sample", world_size=2, gather_with_grad=True)
    assert_type(loss.threshold, float | None)
    assert_type(FilipLoss(rank=1).token_dropping, float)
    patches, tokens = features["patches"], features["tokens"]
    assert_type(fine_grained_loss(patches, tokens, features["mask"], 10.0), Tensor)
"""
WRONG = {
    'SparcLoss(alignment="hard")': "arg-type",
    "SparcLoss(threshold='1')": "arg-type",
    "SparcLoss(world_sise=2)": "call-arg",
    'surface_embeddings(nn.Linear(1, 1), None, tokens="word")': "arg-type",
}


def checked(folder: Path, text: str) -> str:
    path = folder / "user.py"
    path.write_text(text, encoding="utf-8")
    return api.run([str(path), "--config-file=", "--ignore-missing-imports", f"--cache-dir={folder}/cache"])[0]


def test_the_public_interface_has_its_types_and_wrong_arguments_are_found(tmp_path):
    assert checked(tmp_path, USER_FILE).startswith("Success")
    found = checked(tmp_path, USER_FILE + "\n" + "\n".join(WRONG))
    for code in WRONG.values():
        assert f"[{code}]" in found
    assert f"Found {len(WRONG)} errors" in found
