"""The study: its plan, one run, its order, its choice of settings and its report."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from examples.scenes.measures import MEASURES
from examples.scenes.scene import generate_scene
from examples.scenes.worlds import WORLDS
from examples.study import study, training
from examples.study.candidates import CandidateLoss
from examples.study.cures import region_masks
from examples.study.plan import (
    FAMILIES,
    GRID,
    IMAGE_VARIANTS,
    LEARNING_RATES,
    PLANS,
    SEEDS,
    SIZES,
    VARIANTS,
    Run,
    clip_run,
    final_runs,
    tuning_runs,
)
from examples.study.report import markdown_tables, write_report
from examples.study.training import Folders, _training_images, execute, make_loss
from sparc_loss import SparcLoss, functional

pytestmark = pytest.mark.slow

needs_tokenizer = pytest.mark.skipif(
    open_clip.__version__ < "3.3", reason="open_clip's HFTokenizer works from 3.3.0 on"
)
TINY = replace(SIZES["tiny"], scenes=48, held_out=8, scratch_steps=2)
CHOSEN = {family: tuple(zip(GRID, (0.3, 10.0), strict=True)) for family in FAMILIES}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Folders:
    folders = Folders(tmp_path_factory.mktemp("study"))
    study.prepare(folders, TINY)
    return folders


@pytest.fixture(scope="module")
def clip(folders):
    return execute(clip_run("mean", 0), TINY, folders)


def warm(**changes) -> Run:
    return replace(Run("SPARC", "warm", "mean", 0, "sparc"), **changes)


class TestPlan:
    def test_every_run_has_a_file_name_of_its_own(self):
        runs = {run for plan in PLANS for run in [*tuning_runs(), *final_runs(CHOSEN, plan)]}
        assert len({run.name for run in runs}) == len(runs)

    def test_what_both_plans_train_is_the_same_run(self):
        both = set(final_runs(CHOSEN)) & set(final_runs(CHOSEN, "image"))
        assert {run.variant for run in both} == set(VARIANTS) & set(IMAGE_VARIANTS)

    @pytest.mark.parametrize("plan", PLANS)
    def test_every_objective_of_the_plan_is_tuned_by_as_many_runs(self, plan):
        families = [run.family for run in tuning_runs(plan)]
        assert set(families) == {variant.family for variant in PLANS[plan].values()} - {"clip"}
        assert {families.count(family) for family in families} == {4}

    def test_the_first_seeds_can_be_trained_alone(self):
        runs = final_runs(CHOSEN, "recipe", 2)
        assert {run.seed for run in runs} == {0, 1}
        assert set(runs) < set(final_runs(CHOSEN, "recipe"))

    def test_tuning_shares_no_seed_with_the_tables(self):
        assert not {run.seed for run in tuning_runs()} & {seed for seeds in SEEDS.values() for seed in seeds}

    @pytest.mark.parametrize("plan", PLANS)
    def test_every_row_has_every_seed(self, plan):
        runs = final_runs(CHOSEN, plan)
        for run in runs:
            assert [each.seed for each in runs if replace(each, seed=run.seed) == run] == list(SEEDS[plan])

    def test_warm_starts_begin_from_the_clip_of_their_seed(self):
        runs = final_runs(CHOSEN)
        for run in runs:
            assert run.start == "scratch" or run.origin in runs
            assert run.origin is None or (run.origin.seed, run.origin.pooling) == (run.seed, run.pooling)

    @pytest.mark.parametrize(("plan", "variant"), [(plan, variant) for plan in PLANS for variant in PLANS[plan]])
    def test_every_row_is_a_loss_with_its_own_settings_before_the_chosen_ones(self, plan, variant):
        run = next(run for run in final_runs(CHOSEN, plan) if run.variant == variant)
        loss = make_loss(run)
        chosen = {} if variant == "CLIP" else {"fine_grained_weight": 0.3, "fine_grained_scale": 10.0}
        expected = {"global_weight": 0.5, **chosen, **PLANS[plan][variant].settings}
        assert {name: getattr(loss, name) for name in expected} == expected


def test_training_images_go_in_the_order_of_their_captions(tmp_path):
    images = tmp_path / "images" / "train"
    images.mkdir(parents=True)
    for number in (10_000, 10_001, 100_000):
        Image.fromarray(np.full((2, 2, 3), number % 251, np.uint8)).save(images / f"{number:05d}.png")
    assert _training_images(tmp_path)[:, 0, 0, 0].tolist() == [10_000 % 251, 10_001 % 251, 100_000 % 251]


@needs_tokenizer
class TestRun:
    def test_measures_both_splits_with_chance_and_ceiling(self, clip):
        assert set(clip["val"]) == set(clip["test"]) == set(clip["levels"])
        assert all(figure >= 0 and (figure <= 1 or "loss" in name) for name, figure in clip["test"].items())

    def test_the_threshold_is_the_validation_splits_and_each_split_is_measured(self, clip, folders, monkeypatch):
        def split(scenes):
            return scenes.images[0].parent.name

        for name, stand_in in {
            "embed": lambda model, tokenizer, images, scenes: split(scenes),
            "best_background_threshold": lambda embedded, scenes: (embedded, split(scenes)),
            "measure": lambda embedded, scenes, threshold: (embedded, split(scenes), threshold),
            "levels": lambda embedded, scenes: {},
        }.items():
            monkeypatch.setattr(training, name, stand_in)
        result = execute(warm(), TINY, folders)
        assert result["background_threshold"] == ("val", "val")
        assert result["val"] == ("val", "val", ("val", "val"))
        assert result["test"] == ("test", "test", ("val", "val"))

    def test_is_the_same_again(self, clip, folders):
        assert execute(clip_run("mean", 0), TINY, folders) == clip

    def test_a_warm_start_begins_with_the_weights_of_clip(self, clip, folders, monkeypatch):
        monkeypatch.setitem(LEARNING_RATES, "warm", 0.0)
        result = execute(warm(), TINY, folders)
        assert (result["val"], result["test"]) == (clip["val"], clip["test"])

    def test_without_its_fine_grained_half_it_is_clip(self, clip, folders):
        delayed = execute(warm(delay=1.0), TINY, folders)
        assert delayed == execute(warm(variant="CLIP", family="clip"), TINY, folders)
        assert delayed != execute(warm(), TINY, folders)

    def test_shuffled_images_are_another_task(self, clip, folders):
        losses = [execute(warm(shuffled=shuffled), TINY, folders)["training_loss"] for shuffled in (False, True)]
        assert losses[0] != losses[1]

    def test_boxes_are_another_task_the_more_the_more(self, clip, folders):
        losses = {execute(warm(boxes=boxes), TINY, folders)["training_loss"] for boxes in (0.0, 0.5, 1.0)}
        assert len(losses) == 3

    def test_clips_time_is_fewer_steps(self):
        assert TINY.steps(warm(time=0.5)) == 1

    @pytest.mark.parametrize("family", ["filip", "pacl", "gloria", "mgca", "flair"])
    def test_the_baselines_train(self, clip, folders, family):
        result = execute(warm(family=family, settings=CHOSEN[family]), TINY, folders)
        assert torch.tensor(result["training_loss"]).isfinite()

    def test_end_of_text_pooling_trains(self, folders):
        result = execute(clip_run("last", 0), TINY, folders)
        assert result["test"]["phrase_pointing"] >= 0


def cosines(tokens: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    """Of each token with its group by the paper's weights, token by token."""
    groups = []
    for token in tokens:
        similarity = patches @ token
        weights = (similarity - similarity.min()) / (similarity.max() - similarity.min())
        weights = weights * (weights >= 1 / len(patches))
        groups.append(weights @ patches / weights.sum())
    return F.cosine_similarity(torch.stack(groups), tokens, dim=-1)


def softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.exp() / logits.exp().sum()


def sigmoid_loss(logits: torch.Tensor) -> torch.Tensor:
    """The first is the own image."""
    signs = torch.tensor([1.0] + [-1.0] * (len(logits) - 1))
    return -(1 / (1 + (-signs * logits).exp())).log().sum()


def mean(values) -> torch.Tensor:
    return torch.stack(list(values)).mean()


@needs_tokenizer
class TestEmoji:
    def test_its_own_measures_stand_in_its_tables(self, tmp_path):
        folders = Folders(tmp_path)
        study.prepare(folders, TINY, "emoji")
        run = clip_run("mean", 0)
        result = execute(run, TINY, folders)
        assert "new_pair_pointing" in result["test"]
        assert "colour_word_pointing" not in result["test"]
        assert result["test"].keys() == result["levels"].keys()
        header = markdown_tables({run: result}).splitlines()[2]
        assert [name for name in ("kinds", "new pairs", "colours") if name in header] == ["kinds", "new pairs"]
        with pytest.raises(
            SystemExit, match="data has scenes of the world: emoji; expected digits, or another --output"
        ):
            study.prepare(folders, TINY)


class TestCures:
    """Each on a batch made by hand, whose loss and gradient are known from the library's functions."""

    @pytest.fixture
    def outputs(self):
        generator = torch.Generator().manual_seed(0)
        features = {
            "image_features": torch.randn(3, 4, generator=generator),
            "text_features": torch.randn(3, 4, generator=generator),
            "patch_features": torch.randn(3, 6, 4, generator=generator, dtype=torch.float64).requires_grad_(),
            "token_features": torch.randn(3, 5, 4, generator=generator, dtype=torch.float64).requires_grad_(),
        }
        return {**features, "logit_scale": torch.tensor(10.0), "token_mask": torch.arange(5).expand(3, 5) < 4}

    @pytest.mark.parametrize("cure", ["stop-gradient", "normalized weights"])
    def test_the_loss_is_sparcs_by_other_weights(self, cure, outputs):
        loss = make_loss(warm(cure=cure))
        loss.global_weight = 0
        patches, tokens = outputs["patch_features"], outputs["token_features"]
        if cure == "normalized weights":
            similarity = F.normalize(tokens, dim=-1) @ F.normalize(patches, dim=-1).mT
        else:
            similarity = (tokens @ patches.mT).detach()
        grouped = functional.language_grouped_embeddings(functional.alignment_weights(similarity), patches)
        expected = functional.sequence_contrastive_loss(grouped, tokens, outputs["token_mask"], 10.0)
        inputs = (patches, tokens)
        torch.testing.assert_close(loss(**outputs), expected)
        for ours, theirs in zip(
            torch.autograd.grad(loss(**outputs), inputs), torch.autograd.grad(expected, inputs), strict=True
        ):
            torch.testing.assert_close(ours, theirs)

    def test_a_candidate_without_a_change_is_the_librarys_contrast(self, outputs):
        settings = {"image_negatives": 2, "image_contrastive_direction": "both", "image_contrastive_threshold": 1.0}
        outputs["token_mask"][1, 2] = False
        torch.testing.assert_close(CandidateLoss(**settings)(**outputs), SparcLoss(**settings)(**outputs))

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ({"choice": "softmax of each word"}, lambda words, _: mean(-softmax(one)[0].log() for one in words)),
            ({"choice": "sigmoid"}, lambda words, scores: mean(map(sigmoid_loss, scores - scores.mean()))),
            (
                {"choice": "sigmoid with a bias"},
                lambda words, scores: mean(map(sigmoid_loss, scores - scores.mean() - math.log(2))),
            ),
            ({"contrast_scale": 30.0}, lambda words, scores: mean(-softmax(3 * one)[0].log() for one in scores)),
            ({"schedule": "weight grows"}, lambda words, scores: mean(-softmax(one)[0].log() for one in scores) / 4),
            ({"schedule": "images grow"}, lambda words, scores: mean(-softmax(one[:2])[0].log() for one in scores)),
            (
                {"schedule": "weights fall"},
                lambda words, scores: (1 - 0.9 / 4) * mean(-softmax(one)[0].log() for one in scores),
            ),
        ],
    )
    def test_a_candidate_differs_in_one_respect(self, change, expected, outputs):
        """`words` are the scores of each word on its own image and the next two, `scores` those of each caption."""
        outputs["token_mask"][1, 2] = False
        loss = CandidateLoss(global_weight=0, fine_grained_weight=0, image_negatives=2, **change)
        loss.progress = 0.25
        words, scores = [], []
        for caption in range(3):
            valid = outputs["token_mask"][caption]
            tokens = outputs["token_features"][caption][valid]
            each = torch.stack(
                [cosines(tokens, outputs["patch_features"][(caption + k) % 3]) for k in range(3)], dim=1
            )
            words += [*(10 * each)]
            scores.append(10 * each.mean(dim=0))
        torch.testing.assert_close(loss(**outputs), expected(words, torch.stack(scores)))

    def test_both_weights_fall_to_a_tenth(self, outputs):
        settings = {"global_weight": 0, "image_negatives": 2}
        falling, full = CandidateLoss(schedule="weights fall", **settings), SparcLoss(**settings)
        for progress, share in ((0, 1), (0.5, 0.55), (1, 0.1)):
            falling.progress = progress
            torch.testing.assert_close(falling(**outputs), share * full(**outputs))

    def test_the_most_similar_images_are_those_of_the_global_embeddings(self, outputs):
        outputs["image_features"] = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]])
        outputs["text_features"] = torch.tensor([[3.0, 1, 2, 0], [0, 9, 8, 0], [0, 1, 0, 0]])
        loss = CandidateLoss(global_weight=0, fine_grained_weight=0, image_negatives=1, images="most similar")
        losses = []
        for caption, other in enumerate((2, 2, 1)):
            tokens = outputs["token_features"][caption][outputs["token_mask"][caption]]
            scores = [cosines(tokens, outputs["patch_features"][image]).mean() for image in (caption, other)]
            losses.append(-softmax(10 * torch.stack(scores))[0].log())
        torch.testing.assert_close(loss(**outputs), mean(losses))

    def test_captions_are_queries_by_their_global_embedding(self, outputs):
        queries = {"fine_grained_weight": 0, "global_weight": 0, "image_negatives": 2}
        captions, both, words = (
            CandidateLoss(**queries, queries=each)(**outputs) for each in ("captions", "both", "words")
        )
        scores = [
            torch.stack([cosines(text[None].double(), outputs["patch_features"][(i + k) % 3])[0] for k in range(3)])
            for i, text in enumerate(outputs["text_features"])
        ]
        torch.testing.assert_close(captions, mean(-softmax(10 * each)[0].log() for each in scores))
        torch.testing.assert_close(both, captions + words)

    @pytest.mark.parametrize("world", WORLDS)
    def test_words_of_an_object_may_use_half_covered_patches_of_its_boxes_and_the_centres_and_others_all(self, world):
        masks = region_masks(WORLDS[world], 5, (8, 8), 32)
        for index, mask in enumerate(masks):
            scene = generate_scene(WORLDS[world], "train", index)
            told = {word: each.boxes for each in scene.objects for word in each.words.values()}
            for position in range(32):
                boxes = told.get(position, [(0, 0, 64, 64)])
                for patch in range(64):
                    row, column = patch // 8 * 8, patch % 8 * 8
                    expected = False
                    for left, top, right, bottom in boxes:
                        across, down = (
                            min(stop, first + 8) - max(start, first)
                            for start, stop, first in ((left, right, column), (top, bottom, row))
                        )
                        expected |= across > 0 and down > 0 and across * down >= 32
                        middle = (top + bottom) / 2, (left + right) / 2
                        expected |= row <= middle[0] < row + 8 and column <= middle[1] < column + 8
                    assert mask[position, patch] == expected


@needs_tokenizer
class TestOrder:
    def test_what_is_there_is_not_done_again(self, folders, tmp_path):
        run = clip_run("mean", 1)
        first = study.run_all([run], TINY, folders, workers=1)
        written = folders.result(run).stat().st_mtime_ns
        assert study.run_all([run], TINY, folders, workers=1) == first
        assert folders.result(run).stat().st_mtime_ns == written

    def test_a_result_of_other_settings_is_not_taken(self, folders):
        run = clip_run("mean", 0)
        study._write(run, TINY, folders, {"val": {}})
        assert study._read(run, TINY, folders) == {"val": {}}
        assert study._read(run, replace(TINY, scratch_steps=9), folders) is None
        folders.result(run).unlink()

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"scenes": 47}, "data has train scenes: 48; expected 47, or another --output"),
            ({"held_out": 9}, "data has val scenes: 8; expected 9, or another --output"),
            ({"width": 64}, "mean-seed0 has width: 96; expected 64, or another --output"),
            ({"vision_layers": 3}, "mean-seed0 has vision layers: 2; expected 3, or another --output"),
        ],
    )
    def test_scenes_and_models_of_another_size_are_not_taken(self, folders, changed, message):
        with pytest.raises(SystemExit, match=message):
            study.prepare(folders, replace(TINY, **changed))

    def test_clip_whose_weights_are_lost_is_trained_again(self, folders):
        run = clip_run("mean", 2)
        study._write(run, TINY, folders, {"val": {}})
        assert study._read(run, TINY, folders) is None


def test_the_settings_chosen_are_the_best_on_the_validation_split():
    def result(val: float, test: float) -> dict:
        return {"val": dict.fromkeys(study.CHOSEN_BY, val), "test": dict.fromkeys(study.CHOSEN_BY, test)}

    runs = tuning_runs()
    families = {run.family for run in runs}
    results = {run: result(0.1, 0.9) for run in runs}
    best = {family: [run for run in runs if run.family == family][2] for family in families}
    results |= {run: result(0.2, 0.1) for run in best.values()}
    assert study.choose_settings(results) == {family: run.settings for family, run in best.items()}


class TestReport:
    @pytest.fixture
    def results(self):
        level = {"chance": 0.05, "ceiling": 0.9}
        results = {}
        for run in final_runs(CHOSEN):
            figures = {name: 0.25 + 0.1 * run.seed + 0.02 * place for place, name in enumerate(MEASURES)}
            val = dict.fromkeys(MEASURES, 0.9)
            results[run] = {"test": figures, "val": val, "levels": dict.fromkeys(MEASURES, level)}
        return results

    def test_with_five_seeds_differences_are_paired(self):
        results = {}
        for run in final_runs(CHOSEN, "recipe"):
            base = {"CLIP": 0.1, "CLIP + FILIP": 0.2}.get(run.variant, 0.3 + 0.01 * run.seed)
            level = {"chance": 0.05, "ceiling": 0.9}
            figures = dict.fromkeys(MEASURES, base)
            results[run] = {"test": figures, "val": figures, "levels": dict.fromkeys(MEASURES, level)}
        tables = re.sub(" +", " ", markdown_tables(results))
        assert "Difference from CLIP of the same seed, mean and range over the seeds:" in tables
        assert "| SPARC + 3, highest patches | +.22 (+.20 to +.24) |" in tables
        assert "| SPARC + 3, highest patches | +.12 (+.10 to +.14) |" in tables
        assert "| CLIP | -.10 (-.10 to -.10) |" in tables

    def test_tables_have_mean_and_standard_deviation_over_the_seeds(self, results):
        tables = markdown_tables(results)
        # Retrieval is the mean of the first two measures; every other column is the next.
        of_all, of_images = (
            " | ".join(f".{figure} ± .10" for figure in each) for each in ((36, *range(39, 54, 2)), range(55, 66, 2))
        )
        assert "| CLIP + FILIP                  | .36 ± .10 |" in tables
        assert f"| CLIP + FILIP | {of_all} |" in re.sub(" +", " ", tables)
        assert f"| CLIP + FILIP | {of_images} |" in re.sub(" +", " ", tables)
        assert "| chance                        |       .05 |" in tables
        assert "| ceiling                       |       .90 |" in tables
        assert tables.count("(3 seeds)") == 4

    def test_writes_json_tables_and_a_plot_for_each_measure(self, results, tmp_path):
        tables = write_report(tmp_path, results, CHOSEN, {"scenes": 1})
        assert (tmp_path / "tables.md").read_text(encoding="utf-8") == tables
        record = json.loads((tmp_path / "study.json").read_text(encoding="utf-8"))
        assert len(record["runs"]) == len(results)
        assert record["chosen"]["filip"] == {"fine_grained_weight": 0.3, "fine_grained_scale": 10.0}
        assert {path.stem for path in tmp_path.glob("*.png")} == set(MEASURES)


def test_the_gpu_size_without_a_gpu_is_one_error(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--size gpu needs a GPU that torch can use; none is found"):
        study.main(["--size", "gpu", "--output", str(tmp_path / "study")])
    assert not (tmp_path / "study").exists()
