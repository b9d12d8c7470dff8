"""Names of release 0.1.0 that a user could have typed: they work for one more release, with a warning."""

import importlib
from argparse import ArgumentParser, Namespace
from pathlib import Path

import pytest
import torch

from sparc_loss import SparcLoss, diagnostics, fused
from sparc_loss.functional import alignment_weights
from sparc_loss.model_loading import _read_params
from sparc_loss.plugins import discovery
from sparc_loss.plugins.baselines import FILIP
from sparc_loss.plugins.sparc import SPARC


@pytest.mark.parametrize(
    ("module", "name", "expected"),
    [
        ("sparc_loss.metrics", "alignment_metrics", diagnostics.alignment_diagnostics),
        ("sparc_loss.fused_contrast", "image_contrastive_loss", fused.image_contrastive_loss),
        ("sparc_loss.integration.plugin", "load_loss", discovery.load_loss),
    ],
)
def test_a_module_has_its_names_and_warns(module, name, expected):
    with pytest.warns(DeprecationWarning, match=f"{module} is now sparc_loss"):
        old = importlib.reload(importlib.import_module(module))
    assert getattr(old, name) is expected


def test_an_argument_is_taken_for_its_new_name_and_warns():
    similarity = torch.randn(1, 2, 5)
    with pytest.warns(DeprecationWarning, match=r"method=.*alignment="):
        weights = alignment_weights(similarity, method="dense")
    assert torch.equal(weights, alignment_weights(similarity, alignment="dense"))
    with pytest.warns(DeprecationWarning, match=r"metrics=.*diagnostics="):
        assert SparcLoss(metrics=True).diagnostics


@pytest.mark.parametrize(
    ("plugin", "old", "name", "value"),
    [
        (SPARC, ["--sparc-scale", "20"], "sparc_fine_grained_scale", 20),
        (FILIP, ["--filip-scale=3"], "filip_fine_grained_scale", 3),
        (SPARC, ["--sparc-metrics"], "sparc_diagnostics", True),
        (SPARC, ["--no-sparc-metrics"], "sparc_diagnostics", False),
    ],
)
def test_a_flag_is_taken_for_its_new_name_and_warns(plugin, old, name, value, capsys):
    parser = ArgumentParser(prog="train")
    plugin.add_arguments(parser)
    with pytest.warns(DeprecationWarning, match="is now --"):
        args = parser.parse_args(old)
    assert getattr(args, name) == value
    flag = old[0].split("=")[0]
    assert capsys.readouterr().err.startswith(f"train: warning: {flag} is now --")
    assert flag not in parser.format_help()


def test_a_bad_value_of_an_old_flag_is_refused_like_the_new_one(capsys):
    parser = ArgumentParser()
    SPARC.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--sparc-scale", "0"])
    assert "argument --sparc-scale: '0' given; expected a number above 0" in capsys.readouterr().err


def test_the_default_is_not_lost_to_an_old_flag():
    parser = ArgumentParser()
    SPARC.add_arguments(parser)
    assert parser.parse_args([], Namespace()).sparc_fine_grained_scale is None


def test_the_arguments_of_an_older_run_are_read_by_their_new_names(tmp_path: Path):
    (tmp_path / "params.txt").write_text("model: ViT-B-32\nsparc_scale: 20.0\n", encoding="utf-8")
    assert _read_params("show", tmp_path / "params.txt") == {"model": "ViT-B-32", "sparc_fine_grained_scale": 20.0}
