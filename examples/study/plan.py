"""What is trained: which objective, from where, with which settings, by which seed."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import product
from typing import Any, Literal

from sparc_loss.plugins.recipes import RECIPES

Start = Literal["scratch", "warm"]
Pooling = Literal["mean", "last"]

SEEDS: dict[str, tuple[int, ...]] = {
    "objectives": (0, 1, 2),
    "image": (0, 1, 2),
    "recipe": (0, 1, 2, 3, 4),
    "candidates": (0,),
}
# Settings are chosen with a seed apart, on the validation split.
TUNING_SEED = 100
# Half as in the paper's SPARC, for all objectives alike: only the ratio to the fine-grained weight matters much.
GLOBAL_WEIGHT = 0.5
LEARNING_RATES: dict[Start, float] = {"scratch": 2e-3, "warm": 5e-4}
# Every objective gets the same few settings to choose from; CLIP has neither.
GRID: dict[str, tuple[Any, ...]] = {"fine_grained_weight": (0.3, 1.0), "fine_grained_scale": (None, 10.0)}


@dataclass(frozen=True)
class Variant:
    """A row of the tables.

    Attributes:
        family: the loss: "clip" or a key of FAMILIES, for each of which settings are chosen.
        settings: its constructor arguments beyond those chosen.
        shuffled: the fine-grained half sees another pair's image, as a control.
        delay: share of the steps before the fine-grained half begins.
        cure: key of `cures.CURES`.
        boxes: share of the training scenes whose boxes say which patches a word may use.
        time: share of the steps, for as much time as CLIP takes.
        starts: from where it is trained.
    """

    family: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    shuffled: bool = False
    delay: float = 0.0
    cure: str = ""
    boxes: float = 0.0
    time: float = 1.0
    starts: tuple[Start, ...] = ("scratch", "warm")


VARIANTS = {
    "CLIP": Variant("clip"),
    "SPARC": Variant("sparc"),
    "SPARC, threshold 0.5": Variant("sparc", {"threshold": 0.5}, starts=("warm",)),
    "SPARC, threshold 0.8": Variant("sparc", {"threshold": 0.8}, starts=("warm",)),
    "SPARC, no sparsity": Variant("sparc", {"alignment": "dense"}, starts=("warm",)),
    "SPARC, softmax": Variant("sparc", {"alignment": "softmax"}, starts=("warm",)),
    "SPARC, shuffled images": Variant("sparc", shuffled=True, starts=("warm",)),
    "SPARC after 60 % of the steps": Variant("sparc", delay=0.6, starts=("scratch",)),
    "CLIP + FILIP": Variant("filip"),
    "CLIP + PACL": Variant("pacl"),
    "CLIP + GLoRIA": Variant("gloria"),
    "CLIP + MGCA": Variant("mgca"),
}
# The second study: what makes the alignment look at its image?
_ALONE = {"fine_grained_weight": 0.0}
IMAGE_VARIANTS = {
    **{name: VARIANTS[name] for name in ("CLIP", "SPARC", "CLIP + FILIP", "CLIP + GLoRIA")},
    "CLIP + FILIP, CLIP's time": Variant("filip", time=0.5),
    "CLIP + GLoRIA, CLIP's time": Variant("gloria", time=0.23),
    "CLIP + 1 image negative": Variant("sparc", {**_ALONE, "image_negatives": 1}),
    "CLIP + 3 image negatives": Variant("sparc", {**_ALONE, "image_negatives": 3}),
    "CLIP + 7 image negatives": Variant("sparc", {**_ALONE, "image_negatives": 7}),
    "CLIP + 3 image negatives, threshold 0.5": Variant("sparc", {**_ALONE, "image_negatives": 3, "threshold": 0.5}),
    "SPARC + 3 image negatives": Variant("sparc", {"image_negatives": 3}),
    "SPARC + 3 image negatives, threshold 0.5": Variant("sparc", {"image_negatives": 3, "threshold": 0.5}),
    "SPARC, threshold 0.5": VARIANTS["SPARC, threshold 0.5"],
    "SPARC, threshold 0.8": VARIANTS["SPARC, threshold 0.8"],
    "SPARC, stop-gradient": Variant("sparc", cure="stop-gradient", starts=("warm",)),
    "SPARC, normalized weights": Variant("sparc", cure="normalized weights", starts=("warm",)),
    "SPARC, 1 % boxes": Variant("sparc", boxes=0.01, starts=("warm",)),
    "SPARC, 10 % boxes": Variant("sparc", boxes=0.1, starts=("warm",)),
    "SPARC, 100 % boxes": Variant("sparc", boxes=1.0, starts=("warm",)),
}
# The third study: the contrast in both directions and with highest patches alone, with five seeds.
_HIGHEST = {"image_contrastive_direction": "both", "image_contrastive_threshold": 1.0}
_WITHOUT_SEQUENCES = {**_ALONE, "image_negatives": 7, "image_contrastive_weight": 0.5}
RECIPE_VARIANTS = {
    **{name: VARIANTS[name] for name in ("CLIP", "CLIP + FILIP")},
    "CLIP + FLAIR": Variant("flair"),
    "SPARC + 3 image negatives": IMAGE_VARIANTS["SPARC + 3 image negatives"],
    "SPARC + 3, highest patches": Variant("sparc", {"image_negatives": 3, **_HIGHEST}),
    "SPARC + 3, highest patches, weight 1": Variant(
        "sparc", {"fine_grained_weight": 1.0, "image_negatives": 3, **_HIGHEST}
    ),
    "SPARC + 3, highest patches, a tenth": Variant("sparc", RECIPES["highest-patches-light"]),
    "SPARC + 3, softmax over patches": Variant(
        "sparc", {"image_negatives": 3, **_HIGHEST, "contrast_alignment": "softmax"}, cure="candidate"
    ),
    "CLIP + 7, highest patches": Variant("sparc", {**_WITHOUT_SEQUENCES, **_HIGHEST}),
}
# What was tried on the way to the recipe, and the weights of the two halves; one seed each.
_RECIPE: dict[str, Any] = {"image_negatives": 3, **_HIGHEST}


def _candidate(**changes: Any) -> Variant:
    return Variant("sparc", {**_RECIPE, **changes}, cure="candidate")


CANDIDATE_VARIANTS = {
    **{name: VARIANTS[name] for name in ("CLIP", "CLIP + FILIP")},
    "SPARC + 3, highest patches": RECIPE_VARIANTS["SPARC + 3, highest patches"],
    "one direction": Variant("sparc", {**_RECIPE, "image_contrastive_direction": "text_to_image"}),
    "threshold 1/P": Variant("sparc", {**_RECIPE, "image_contrastive_threshold": None}),
    "threshold 0.5": Variant("sparc", {**_RECIPE, "image_contrastive_threshold": 0.5}),
    "threshold 0.8": Variant("sparc", {**_RECIPE, "image_contrastive_threshold": 0.8}),
    "softmax over patches": _candidate(contrast_alignment="softmax"),
    "softmax of each word": _candidate(choice="softmax of each word"),
    "sigmoid": _candidate(choice="sigmoid"),
    "sigmoid, learned bias": _candidate(choice="sigmoid with a bias"),
    "most similar images": _candidate(images="most similar"),
    "1/temperature 10": _candidate(contrast_scale=10.0),
    "1/temperature 30": _candidate(contrast_scale=30.0),
    "weight grows from 0": _candidate(schedule="weight grows"),
    "images grow from 1 to 7": _candidate(schedule="images grow", image_negatives=7),
    "weights fall to a tenth": _candidate(schedule="weights fall"),
    "captions as queries": _candidate(queries="captions", image_contrastive_threshold=None),
    "captions and words": _candidate(queries="both"),
    **{f"SPARC, weight {weight}": Variant("sparc", {"fine_grained_weight": weight}) for weight in (0.1, 1.0, 3.0)},
    **{
        f"recipe, weight {weight}": Variant("sparc", {**_RECIPE, "fine_grained_weight": weight})
        for weight in (0.1, 1.0, 3.0)
    },
    **{
        f"recipe, contrast's weight {weight}": Variant("sparc", {**_RECIPE, "image_contrastive_weight": weight})
        for weight in (0.1, 0.3, 3.0)
    },
}
PLANS = {
    "objectives": VARIANTS,
    "image": IMAGE_VARIANTS,
    "recipe": RECIPE_VARIANTS,
    "candidates": CANDIDATE_VARIANTS,
}
# Family -> what a step costs, in CLIP's; orders the runs and moves the progress bar.
FAMILIES = {"sparc": 1.0, "filip": 2.0, "pacl": 1.0, "gloria": 4.4, "mgca": 1.4, "flair": 1.5}
# The rows repeated with a text tower that pools its last token, as open_clip's own do.
LAST_TOKEN_ROWS = ("CLIP", "SPARC", "SPARC, threshold 0.8", "CLIP + FILIP")


@dataclass(frozen=True)
class Size:
    """How large the study is."""

    scenes: int = 16_000
    held_out: int = 500
    scratch_steps: int = 500
    warm_steps: int = 200
    batch_size: int = 64
    warmup: int = 50
    width: int = 96
    vision_layers: int = 2
    learning_rate: float = 1.0  # times LEARNING_RATES
    device: str = "cpu"

    def steps(self, run: "Run") -> int:
        return round(run.time * (self.scratch_steps if run.start == "scratch" else self.warm_steps))


_ON_A_GPU: dict[str, Any] = {
    "batch_size": 256,
    "warmup": 500,
    "width": 256,
    "vision_layers": 6,
    "learning_rate": 0.5,
    "device": "cuda",
}
SIZES = {
    "cpu": Size(),
    "gpu": Size(200_000, 2_000, 6_000, 2_000, **_ON_A_GPU),
    "gpu-short": Size(20_000, 500, 625, 250, **_ON_A_GPU),  # minutes
    "tiny": Size(scenes=128, held_out=20, scratch_steps=3, warm_steps=2, batch_size=16, warmup=1),
}


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        variant: key of VARIANTS, or of the tuning "tune FAMILY".
        start: "scratch", or "warm" from the CLIP run of the same pooling and seed.
        pooling: of the text tower.
        seed: of the weights and of the batches.
        family, settings, shuffled, delay, cure, boxes, time: see Variant.
    """

    variant: str
    start: Start
    pooling: Pooling
    seed: int
    family: str
    settings: tuple[tuple[str, Any], ...] = ()
    shuffled: bool = False
    delay: float = 0.0
    cure: str = ""
    boxes: float = 0.0
    time: float = 1.0

    @property
    def name(self) -> str:
        """A file name of its own for each run."""
        tuned = "".join(f"-{value}" for _, value in self.settings) if self.variant.startswith("tune") else ""
        return f"{self.pooling}-{self.start}-{file_name(self.variant)}{tuned}-seed{self.seed}"

    @property
    def origin(self) -> "Run | None":
        """The run whose weights this one starts from; None from scratch."""
        return None if self.start == "scratch" else clip_run(self.pooling, self.seed)

    @property
    def is_origin(self) -> bool:
        """Whether warm starts begin from this run's weights."""
        return self == clip_run(self.pooling, self.seed)

    @property
    def cost(self) -> float:
        """Of a step, in CLIP's."""
        return FAMILIES.get(self.family, 1.0)


def file_name(row: str) -> str:
    """The name of a row as a part of a file's name."""
    return "".join(letter if letter.isalnum() else "-" for letter in row.lower())


def clip_run(pooling: Pooling, seed: int) -> Run:
    """CLIP from scratch, from which the warm starts begin."""
    return Run("CLIP", "scratch", pooling, seed, "clip")


def tuning_runs(plan: str = "objectives") -> list[Run]:
    """Each family of the plan with each of the settings, warm-started."""
    of_plan = {variant.family for variant in PLANS[plan].values()}
    return [
        Run(f"tune {family}", "warm", "mean", TUNING_SEED, family, tuple(zip(GRID, values, strict=True)))
        for family in FAMILIES
        if family in of_plan
        for values in product(*GRID.values())
    ]


def final_runs(
    chosen: Mapping[str, tuple[tuple[str, Any], ...]], plan: str = "objectives", seeds: int | None = None
) -> list[Run]:
    """Every row of the plan's tables with every seed, or the first `seeds`, by the settings chosen for each family."""
    runs = []
    for seed in SEEDS[plan][:seeds]:
        for pooling in ("mean", "last") if plan == "objectives" else ("mean",):
            for name, variant in PLANS[plan].items():
                run = _run(name, variant, pooling, seed, chosen)
                starts = variant.starts if pooling == "mean" else ("warm",) if name in LAST_TOKEN_ROWS else ()
                if pooling == "last" and name == "CLIP":
                    starts = ("scratch", "warm")
                runs += [replace(run, start=start) for start in starts]
    return runs


def _run(
    name: str, variant: Variant, pooling: Pooling, seed: int, chosen: Mapping[str, tuple[tuple[str, Any], ...]]
) -> Run:
    settings = tuple({**dict(chosen.get(variant.family, ())), **variant.settings}.items())
    how = {each.name: getattr(variant, each.name) for each in fields(Variant) if each.name not in _NOT_OF_A_RUN}
    return Run(name, "warm", pooling, seed, settings=settings, **how)


_NOT_OF_A_RUN = ("settings", "starts")
