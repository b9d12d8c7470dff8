import re
from pathlib import Path

import pytest
from launching import run_python

pytestmark = pytest.mark.slow

LOOP = Path(__file__).parents[2] / "examples" / "custom_loop.py"


def test_the_loop_to_paste_runs_and_prints_both_terms_of_every_step():
    finished = run_python(str(LOOP))
    assert finished.returncode == 0, finished.stdout
    steps = re.findall(r"step (\d): contrastive_loss \d\.\d+ fine_grained_loss \d\.\d+", finished.stdout)
    assert steps == ["0", "1", "2", "3", "4"]
