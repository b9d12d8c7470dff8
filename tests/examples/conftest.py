"""Makes `examples`, which is not installed, importable as it is under `python -m examples.NAME` from the root."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
