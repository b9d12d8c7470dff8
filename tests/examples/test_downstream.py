"""The study of backbones: its data, its order, its tables, and that it goes on where it was."""

import csv
import json
import shlex
from pathlib import Path

import open_clip
import pytest

from examples.captioning.command import make_captioning_parser
from examples.detection.command import make_detection_parser
from examples.downstream import study
from examples.downstream.optimisation import training_order
from examples.downstream.scenes import CAPTIONS_OF_AN_IMAGE, HELD_OUT_COLOURS, write_downstream_data
from examples.downstream.study import BACKBONES, TASKS, UNTRAINED, Job, main, markdown_tables
from examples.scenes.dataset import read_annotations, write_dataset
from examples.scenes.digits import COLOURS
from sparc_loss.evaluation.dataset import EvaluationData, read_data

needs_tokenizer = pytest.mark.skipif(
    open_clip.__version__ < "3.3", reason="open_clip's HFTokenizer works from 3.3.0 on"
)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "data"
    return write_dataset(folder, {"train": 20, "val": 1, "test": 6}, workers=1)


@pytest.fixture(scope="module")
def data(scenes) -> Path:
    return write_downstream_data(scenes.parent / "downstream", scenes)


def read(path: Path) -> EvaluationData:
    return read_data(path, columns=("boxes",))


def test_training_has_every_box_but_those_of_the_held_out_colours(scenes, data):
    train = read(data / "detection-train.csv")
    names = {each.phrase for objects in train.objects for each in objects}
    assert names == {f"a {colour}" for colour in COLOURS if colour not in HELD_OUT_COLOURS}
    # A caption names each object once, so as many words of colours or kinds as there are boxes and more.
    said = [caption.replace(",", "").split() for caption in train.captions]
    for colour in names:
        word = colour.removeprefix("a ")
        boxes = [sum(each.phrase == colour for each in objects) for objects in train.objects]
        assert all(words.count(word) <= number for words, number in zip(said, boxes, strict=True))
    assert any(set(words) & set(HELD_OUT_COLOURS) for words in said)


def test_a_test_scene_has_all_its_boxes_once_and_several_captions(scenes, data):
    test, truth = read(data / "test.csv"), read_annotations(scenes, "test")
    assert [len(captions) for captions in test.captions_of()] == [CAPTIONS_OF_AN_IMAGE] * 6
    for image, captions in enumerate(test.captions_of()):
        assert test.captions[captions[0]] == truth.captions[image]
        assert len({test.captions[caption] for caption in captions}) > 1
        boxes = sorted(each.box for caption in captions for each in test.objects[caption])
        assert boxes == sorted(box for each in truth.objects[image] for box in each.boxes)
        for caption in captions:
            words = test.captions[caption].replace(",", "").split()
            assert all(each.kind in words for each in truth.objects[image])


def test_the_data_are_the_same_each_time(scenes, data, tmp_path):
    again = write_downstream_data(tmp_path / "again", scenes)
    for file in data.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes()


def test_every_image_comes_as_often_as_another_in_an_order_of_the_seed():
    order = training_order(7, steps=6, batch_size=4, seed=1)
    assert len(order) == 24
    counts = [order.count(image) for image in range(7)]
    assert max(counts) - min(counts) == 1
    assert order == training_order(7, steps=6, batch_size=4, seed=1)
    assert order != training_order(7, steps=6, batch_size=4, seed=2)


def test_tables_have_a_row_per_backbone_with_the_spread_over_seeds(tmp_path):
    columns = {name for task in TASKS for name in task.columns.values()}

    def record(figure: float | None) -> dict:
        return {"measures": dict.fromkeys(columns, figure)}

    records = [
        (Job(task, row, seed, (), tmp_path), record(figure))
        for task in TASKS
        for row, figures in {"CLIP": (0.1, 0.3), "SPARC": (None, None)}.items()
        for seed, figure in enumerate(figures)
    ]
    tables = markdown_tables(records)
    assert tables.count("(2 seeds)") == len(TASKS)
    assert tables.count("| CLIP ") == len(TASKS)
    assert "0.200 ± 0.141" in tables
    assert "| SPARC |             - |" in tables


@pytest.mark.parametrize(
    ("folder", "make_parser"), [("detection", make_detection_parser), ("captioning", make_captioning_parser)]
)
def test_the_command_of_the_readme_can_be_given(folder, make_parser):
    readme = (Path(study.__file__).parents[1] / folder / "README.md").read_text(encoding="utf-8")
    command = readme.partition(f"python -m examples.{folder} ")[2].partition("```")[0].replace("\\\n", " ")
    args = make_parser().parse_args(shlex.split(command))
    assert (args.train_data, args.test_data, args.output) == ("train.csv", "test.csv", "figures.json")


@pytest.mark.slow
@needs_tokenizer
def test_the_study_trains_what_is_missing_and_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    flags = ["--size", "tiny", "--seeds", "1", "--output", str(tmp_path / "study")]
    monkeypatch.setattr(study, "TASKS", TASKS[1:])
    main(flags)
    report = tmp_path / "study" / "downstream"
    tables = (report / "tables.md").read_text(encoding="utf-8")
    assert tables in capsys.readouterr().out
    rows = [line.split("|")[1].strip() for line in tables.splitlines() if line.startswith("| ")]
    assert [row for row in rows if set(row) != {"-"} and row] == 2 * [UNTRAINED, *BACKBONES]
    runs = json.loads((report / "downstream.json").read_text(encoding="utf-8"))["runs"]
    assert {(run["task"], run["backbone"]) for run in runs} == {
        (task.name, row) for task in TASKS[1:] for row in (UNTRAINED, *BACKBONES)
    }

    files = sorted(report.glob("*-seed0.json"))
    written = [file.stat().st_mtime_ns for file in files]
    files[0].unlink()
    main(flags)
    assert (report / "tables.md").read_text(encoding="utf-8") == tables
    assert [file.stat().st_mtime_ns for file in files][1:] == written[1:]


@pytest.mark.slow
def test_a_figure_of_other_flags_is_made_anew(tmp_path):
    job = Job(TASKS[0], "CLIP", 0, ("--steps", "2"), tmp_path / "figure.json")
    assert not study._is_done(job)
    job.output.write_text(json.dumps({"flags": ["--steps", "3"]}), encoding="utf-8")
    assert not study._is_done(job)
    job.output.write_text(json.dumps({"flags": ["--steps", "2"]}), encoding="utf-8")
    assert study._is_done(job)


def test_the_csv_has_the_columns_of_the_evaluation(data):
    with open(data / "test.csv", newline="", encoding="utf-8") as file:
        assert next(csv.reader(file, delimiter="\t")) == ["filepath", "title", "boxes"]
