"""`make train`, small, as a real process."""

import json
from pathlib import Path

import open_clip
import pytest
from launching import run_python

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(open_clip.__version__ < "3.3", reason="open_clip's HFTokenizer works from 3.3.0 on"),
]

MEASURES = {
    "image_to_text_recall",
    "text_to_image_recall",
    "hard_negatives",
    "k_precision",
    "colour_word_pointing",
    "kind_word_pointing",
    "phrase_pointing",
    "phrase_tokens_pointing",
    "mean_iou",
    "right_images",
    "shuffled_images",
    "constant_images",
    "right_images_loss",
    "shuffled_images_loss",
    "constant_images_loss",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    small = ("--scenes", "128", "--start-epochs", "1", "--epochs", "1")
    finished = run_python("-m", "examples.scenes", "--runs", str(runs), *small)
    assert finished.returncode == 0, finished.stdout
    return finished.stdout, next(runs.iterdir())


def test_it_ends_with_a_table_of_every_measure_for_each_model_and_chance_and_ceiling(finished):
    output, run = finished
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    assert list(results) == ["start", "CLIP", "SPARC", "recipe", "chance", "ceiling"]
    assert all(set(column) == MEASURES for column in results.values())
    assert all(x >= 0 and (x <= 1 or "loss" in name) for each in results.values() for name, x in each.items())
    assert (run / "table.md").read_text(encoding="utf-8") in output


def test_it_shows_what_words_select(finished):
    output, run = finished
    assert (run / "words.png").stat().st_size > 10_000
    page = (run / "words.html").read_text(encoding="utf-8")
    assert [page.count(f">{name}</h2>") for name in ("CLIP", "recipe")] == [6, 6]
    assert str(run / "words.html") in output


def test_sparc_and_the_control_start_from_the_same_checkpoint(finished):
    _, run = finished
    parameters = {name: (run / "logs" / name / "params.txt").read_text(encoding="utf-8") for name in ("CLIP", "SPARC")}
    assert all(f"model: local-dir:{run / 'models' / 'start'}" in text for text in parameters.values())
    assert "loss: sparc" in parameters["SPARC"]
    assert "loss: clip" in parameters["CLIP"]


def test_the_recipe_trains_from_scratch_for_as_many_epochs_as_start_and_sparc_together(finished):
    _, run = finished
    parameters = (run / "logs" / "recipe" / "params.txt").read_text(encoding="utf-8")
    assert f"model: local-dir:{run / 'models' / 'untrained'}" in parameters
    assert "sparc_image_negatives: 3" in parameters
    assert "epochs: 2\n" in parameters


def test_the_models_are_folders_that_open_clip_loads(finished):
    _, run = finished
    code = f"import open_clip; print(type(open_clip.create_model('local-dir:{run / 'models' / 'SPARC'}')).__name__)"
    loaded = run_python("-c", code)
    assert loaded.stdout.split()[-1] == "CustomTextCLIP", loaded.stdout


def test_sparc_loss_evaluate_measures_its_models_on_its_scenes(finished):
    output, run = finished
    data = run / "data"
    assert f"The test scenes, for sparc-loss evaluate: {data / 'test-evaluate.csv'}" in output
    measured = run_python(
        *("-m", "sparc_loss.evaluation.command", "--model", f"local-dir:{run / 'models' / 'SPARC'}"),
        *("--data", str(data / "test-evaluate.csv"), "--classes", str(data / "classes.txt"), "--workers", "0"),
        *("--background-threshold", "0.5"),
    )
    assert measured.returncode == 0, measured.stdout
    names = [line.split("|")[1].strip() for line in measured.stdout.splitlines() if line.startswith("| ")]
    assert {"hard negatives", "pointing, words of captions", "mIoU with background", "shuffled images"} <= set(names)


def test_the_run_has_a_folder_of_its_own(finished):
    _, run = finished
    assert run.name.startswith("scenes-digits-")
    assert Path(run.parent / run.name / "data" / "train.csv").is_file()
