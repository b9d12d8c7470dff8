"""Random cases of the loss against the slow reference: `python -m tests.fuzz --cases 20000` (make fuzz).

Sizes 1 to 9, masks with holes, every option, features of each dtype. The reference computes in float64 from the same
rounded features. A case is left out, and counted, where a similarity lies so close to the threshold, or two so close
to each other at its end, that float32 may take the other side: there the loss has a jump.
"""

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))

import reference
from implementations import IMPLEMENTATIONS

from sparc_loss.functional import ALIGNMENTS, REDUCTIONS

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 1e-4, torch.float16: 1e-4}


def random_case(rng: np.random.Generator, dtype: torch.dtype) -> dict[str, object]:
    """Arguments of `fine_grained_loss`."""
    b, p, length, d = rng.integers(1, 10, 4)

    def features(*shape: int) -> Tensor:
        return torch.from_numpy(rng.normal(size=shape) * 10.0 ** rng.integers(-2, 3)).to(dtype)

    def mask(*shape: int) -> Tensor:
        return torch.from_numpy(rng.random(shape) < rng.choice([0.5, 0.8, 1.0]))

    return {
        "patch_features": features(b, p, d),
        "token_features": features(b, length, d),
        "token_mask": mask(b, length),
        "logit_scale": float(rng.choice([1.0, 10.0, 50.0])),
        "threshold": rng.choice([None, 0.0, 0.3, 0.5]),
        "alignment": str(rng.choice(ALIGNMENTS)),
        "reduction": str(rng.choice(REDUCTIONS)),
        "patch_mask": mask(b, p) if rng.random() < 0.5 else None,
        "region_mask": mask(b, length, p) if rng.random() < 0.5 else None,
    }


def has_a_close_call(case: dict[str, object], margin: float) -> bool:
    """Whether a normalised similarity is within `margin` of the threshold, or a spread of similarities tiny."""
    similarity = case["token_features"].double() @ case["patch_features"].double().mT
    usable = torch.ones_like(similarity, dtype=torch.bool)
    if case["patch_mask"] is not None:
        usable = usable & case["patch_mask"][:, None]
    if case["region_mask"] is not None:
        usable = usable & case["region_mask"]
    lowest = similarity.masked_fill(~usable, torch.inf).amin(dim=-1, keepdim=True)
    spread = similarity.masked_fill(~usable, -torch.inf).amax(dim=-1, keepdim=True) - lowest
    number = usable.sum(dim=-1, keepdim=True)
    sigma = 1 / number if case["threshold"] is None else case["threshold"]
    normalised = (similarity - lowest) / spread
    at_the_ends = (normalised == 0) | (normalised == 1)
    close = usable & (number > 1) & ~at_the_ends & ((normalised - sigma).abs() < margin)
    tiny = (number[..., 0] > 1) & (spread[..., 0] < margin * similarity.abs().amax(dim=-1))
    return bool((case["alignment"] == "sparse" and close.any()) or tiny.any())


def error(case: dict[str, object], function: Callable[..., Tensor]) -> float:
    """Absolute error of the loss, over the larger of 1 and the loss itself."""
    arguments = {
        name: value.double().numpy() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in case.items()
    }
    arguments = {name: value.numpy() if isinstance(value, Tensor) else value for name, value in arguments.items()}
    expected = reference.fine_grained(**arguments).loss
    return abs(function(**case).item() - expected) / max(1.0, abs(expected))


def fuzz(
    cases: int, function: Callable[..., Tensor], seed: int = 0, progress: bool = False
) -> tuple[dict[torch.dtype, float], Counter]:
    """The worst error of each dtype over `cases` cases in all, and what became of them."""
    rng = np.random.default_rng(seed)
    worst: dict[torch.dtype, float] = defaultdict(float)
    counts: Counter = Counter()
    dtypes = list(TOLERANCES)
    for index in tqdm(range(cases), disable=not progress):
        dtype = dtypes[index % len(dtypes)]
        case = random_case(rng, dtype)
        if dtype != torch.float64 and has_a_close_call(case, 1e-4):
            counts["left out"] += 1
            continue
        counts[dtype] += 1
        worst[dtype] = max(worst[dtype], error(case, function))
    return dict(worst), counts


def main() -> int:
    """Print the worst error of each dtype; 1 if one is above its tolerance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    failed = False
    for name, function in IMPLEMENTATIONS.items():
        worst, counts = fuzz(args.cases, function, args.seed, progress=True)
        print(f"{name}: {args.cases} cases, seed {args.seed}; {counts['left out']} left out, too close to a jump")
        for dtype, value in worst.items():
            allowed = f"allowed {TOLERANCES[dtype]:.0e}"
            print(f"  {str(dtype)[6:]:<9} {counts[dtype]:>6} cases   worst error {value:.1e}   {allowed}")
            failed |= value > TOLERANCES[dtype]
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
