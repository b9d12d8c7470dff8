"""Settings of every test run, and the golden vectors."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from launching import write_tiny_data

torch.set_num_threads(1)

settings.register_profile("default", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("default"), derandomize=True)
settings.register_profile("quick", settings.get_profile("default"), max_examples=15)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=2000)
settings.load_profile("ci" if os.environ.get("CI") else "default")

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_CASES = {case["name"]: case for case in json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny data set and model of `launching`."""
    folder = tmp_path_factory.mktemp("training")
    write_tiny_data(folder)
    return folder


@pytest.fixture(params=GOLDEN_CASES)
def golden(request: pytest.FixtureRequest) -> SimpleNamespace:
    """One golden case: its settings, its inputs as float64 tensors and what the loss must be (golden/README.md)."""
    arrays = np.load(GOLDEN / f"{request.param}.npz")
    return SimpleNamespace(**GOLDEN_CASES[request.param], **{name: torch.from_numpy(arrays[name]) for name in arrays})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many of open_clip's models were walked (embeddings/test_every_model.py), whatever the verbosity."""
    walked = [
        report.nodeid
        for report in terminalreporter.stats.get("passed", [])
        if "test_every_model_surfaces" in report.nodeid
    ]
    if walked:
        terminalreporter.write_line(f"{len(walked)} models of open_clip surface their patches and tokens")
