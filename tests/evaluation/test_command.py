"""`sparc-loss evaluate`: of checkpoints of both trainings, as a real process, and what it refuses."""

import json
import shutil
from copy import copy
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from launching import MODEL_CONFIG, SPARC, STOCK, run_python, train, write_model
from PIL import Image

from sparc_loss import cli
from sparc_loss.evaluation import command

# What the console script runs.
SCRIPT = "import sys; from sparc_loss import cli; sys.exit(cli.main())"
CLASSES = ("red", "green", "blue", "yellow")


@pytest.fixture(scope="module")
def folder(folder):
    """Tiny data with all columns, and a local-dir folder without weights."""
    lines = (folder / "val.csv").read_text(encoding="utf-8").splitlines()
    annotated = [lines[0] + "\tboxes\tmask\tlabel\thard_negative"]
    for index, line in enumerate(lines[1:]):
        colour = CLASSES[index % 4]
        mask = np.zeros((32, 32), np.uint8)
        mask[8:24, 8:24], mask[0] = 1 + index % 4, 255
        Image.fromarray(mask).save(folder / f"mask{index}.png")
        box = json.dumps([{"phrase": f"a {colour} scene", "box": [8, 8, 24, 24], "words": [1, 2]}])
        field = '"' + box.replace('"', '""') + '"'
        annotated.append(f"{line}\t{field}\t{folder / f'mask{index}.png'}\t{colour}\ta scene, {colour} number!")
    (folder / "annotated.csv").write_text("\n".join(annotated) + "\n", encoding="utf-8")
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")
    (folder / "templates.txt").write_text("a {} scene\n{}\n", encoding="utf-8")
    (folder / "nouns.txt").write_text("scene\nnumber\n" + "\n".join(CLASSES), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def weights(folder):
    """A bare state_dict, and a local-dir folder with the same weights."""
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder / 'model'}")
    shutil.copytree(folder / "model", folder / "with-weights")
    torch.save(model.state_dict(), folder / "with-weights" / "open_clip_pytorch_model.bin")
    return folder / "with-weights" / "open_clip_pytorch_model.bin"


def flags(folder, data="val.csv", **others):
    named = {
        "model": f"local-dir:{folder / 'with-weights'}",
        "data": folder / data,
        "device": "cpu",
        "workers": 0,
        "batch-size": 4,
        **others,
    }
    return [part for flag, value in named.items() if value is not None for part in (f"--{flag}", str(value))]


def every_measure(folder):
    return {
        "classes": folder / "classes.txt",
        "templates": folder / "templates.txt",
        "nouns-and-adjectives": folder / "nouns.txt",
        "background-threshold": 0.0,
    }


def trained(folder, name, launcher):
    train(folder, name=name, launcher=launcher)
    return folder / "logs" / name / "checkpoints" / "epoch_1.pt"


def refusal(capsys, *arguments):
    """The one line with which it stops, with code 2 and nothing on standard output."""
    with pytest.raises(SystemExit) as stopped:
        command.main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    line = printed.err.splitlines()[-1]
    assert line.startswith("sparc-loss evaluate: error: ")
    return line


@pytest.mark.slow
def test_a_checkpoint_of_ours_as_a_real_process(folder):
    output = folder / "out.json"
    checkpoint = trained(folder, "sparc", SPARC)
    options = {"model": f"local-dir:{folder / 'model'}", "pretrained": checkpoint, **every_measure(folder)}
    arguments = flags(folder, "annotated.csv", output=output, **options)
    finished = run_python("-c", SCRIPT, "evaluate", *arguments)
    assert finished.returncode == 0, finished.stdout
    record = json.loads(output.read_text(encoding="utf-8"))
    # Of 8 images and 4 classes there is no recall at 10 and no top 5.
    assert list(record["measures"]) == [name for name in command.TITLES if not name.endswith(("R@10", "top5"))]
    for name, each in record["measures"].items():
        row = f"| {each['value']:.3f} | {each['chance']:6.3f} | {each['ceiling']:7.3f} | {each['count']:5d} |\n"
        assert f"| {command.TITLES[name].ljust(35)} {row}" in finished.stdout
    for images in ("right", "shuffled", "constant"):
        loss = record["image_dependence"][images]["loss"]
        assert f"| {images + ' images':20} | {loss:.3f} |" in finished.stdout
    assert (record["images"], record["captions"], record["pretrained"]) == (8, 8, str(checkpoint))


@pytest.mark.slow
def test_a_checkpoint_of_plain_open_clip(figures, folder):
    plain = trained(folder, "clip", STOCK)
    measures, _ = figures(model=f"local-dir:{folder / 'model'}", pretrained=plain, **every_measure(folder))
    assert measures["mean_iou_with_background"]["count"] == 5


def test_the_console_script_hands_its_arguments_over(monkeypatch):
    monkeypatch.setattr(command, "main", lambda argv: argv == ["--model", "RN50"] and 7)
    assert cli.main(["evaluate", "--model", "RN50"]) == 7


@pytest.fixture
def figures(folder, weights, tmp_path, capsys):
    """What is measured with the given flags."""

    def figures(data="annotated.csv", **others):
        others = {"classes": folder / "classes.txt"} | others if data == "annotated.csv" else others
        options = flags(folder, data, output=tmp_path / "out.json", **others)
        assert command.main(options) == 0
        record = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
        assert list(tmp_path.iterdir()) == [tmp_path / "out.json"]
        return record["measures"], record["image_dependence"]

    return figures


@pytest.fixture
def model_configs(monkeypatch):
    """What a test adds to open_clip's models is gone after it."""
    for registry in ("_MODEL_CONFIGS", "_MODEL_CONFIG_PATHS"):
        monkeypatch.setattr(open_clip.factory, registry, copy(getattr(open_clip.factory, registry)))


@pytest.mark.usefixtures("model_configs")
def test_the_same_weights_measure_the_same_however_they_are_stored(figures, folder, weights, tmp_path_factory):
    stored = tmp_path_factory.mktemp("stored") / "checkpoint.pt"
    state = torch.load(weights, weights_only=True)
    expected = figures()
    torch.save({"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}}, stored)
    assert figures(model=f"local-dir:{folder / 'model'}", pretrained=stored) == expected
    open_clip.add_model_config(folder / "tiny.json")
    assert figures(model="tiny", pretrained=weights) == expected


def test_given_weights_win_over_those_in_the_folder(figures, folder, weights, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "other.pt"
    torch.manual_seed(1)
    torch.save(open_clip.create_model(f"local-dir:{folder / 'model'}").state_dict(), other)
    assert figures(pretrained=other)[1]["right"] != figures()[1]["right"]


def test_the_probe_measures_the_loss_that_the_flags_describe(figures):
    default = figures()[1]
    assert figures(**{"sparc-threshold": 0.9})[1]["right"] != default["right"]
    assert figures(**{"sparc-alignment": "softmax"})[1]["right"] != default["right"]
    assert figures(**{"sparc-tokens": "all"})[1]["tokens"] == default["tokens"] + 16
    # At scale 0 all logits are equal: the logarithm of the number of tokens.
    assert figures(**{"sparc-fine-grained-scale": 0})[1]["right"]["loss"] == pytest.approx(np.log(7), abs=0.01)


@pytest.mark.parametrize("precision", ["amp_bf16", "pure_bf16"])
def test_other_precisions_measure_about_the_same(figures, precision):
    right, other = figures()[1]["right"], figures(precision=precision)[1]["right"]
    assert other["loss"] == pytest.approx(right["loss"], rel=0.1)
    assert other != right


def test_images_and_captions_alone(figures):
    measures, dependence = figures(data="val.csv")
    assert {name.split("@")[0] for name in measures} == {"image_to_text_R", "text_to_image_R", "k_precision"}
    assert dependence["tokens"] > 0


def test_a_model_without_weights_is_refused_not_measured_at_random(folder, capsys, tmp_path):
    arguments = flags(folder, model=f"local-dir:{folder / 'model'}", output=tmp_path / "out.json")
    line = refusal(capsys, *arguments)
    assert "model cannot be loaded: RuntimeError: Required pretrained weights" in line
    assert list(tmp_path.iterdir()) == []


def test_a_built_in_model_without_weights_is_refused(folder, capsys):
    line = refusal(capsys, *flags(folder, model="RN50"))
    assert "argument --pretrained: not given, and RN50 has no default weights; expected openai, yfcc15m, cc12m" in line


def test_an_unknown_model_answers_with_the_nearest(folder, capsys):
    line = refusal(capsys, *flags(folder, model="ViT-B32", pretrained="openai"))
    assert "'ViT-B32' is no model of open_clip; expected one of open_clip.list_models()" in line
    assert line.endswith("did you mean 'ViT-B-32'?")


def test_an_unknown_tag_is_refused(folder, capsys):
    line = refusal(capsys, *flags(folder, model="RN50", pretrained="nowhere"))
    assert "RN50 with nowhere cannot be loaded: RuntimeError: Pretrained value 'nowhere' is not a known tag" in line


def test_a_missing_checkpoint_is_refused(folder, capsys):
    line = refusal(capsys, *flags(folder, pretrained="no.pt"))
    assert "argument --pretrained: 'no.pt' is no file; expected a file of weights" in line


def test_a_checkpoint_of_another_model_is_refused_in_one_line(folder, weights, capsys, tmp_path):
    write_model(tmp_path / "wider", {**MODEL_CONFIG, "embed_dim": 48})
    line = refusal(capsys, *flags(folder, model=f"local-dir:{tmp_path / 'wider'}", pretrained=weights))
    assert "cannot be loaded: RuntimeError: Error(s) in loading state_dict for CLIP" in line
    assert len(line) < 600


def test_a_file_that_is_no_checkpoint_is_refused(folder, weights, capsys):
    line = refusal(capsys, *flags(folder, pretrained=folder / "val.csv"))
    assert "val.csv cannot be loaded: " in line


def test_a_tower_that_cannot_be_surfaced_is_refused_by_name(folder, capsys, tmp_path):
    write_model(tmp_path / "uncovered", {**MODEL_CONFIG, "vision_cfg": {"timm_model_name": "test_resnet"}})
    name = f"local-dir:{tmp_path / 'uncovered'}"
    torch.save(open_clip.create_model(name).state_dict(), tmp_path / "uncovered" / "model.pth")
    line = refusal(capsys, *flags(folder, model=name))
    assert "sparc-loss evaluate: error: model.visual is a TimmModel with a ResNet trunk" in line


def test_a_csv_that_cannot_be_read_is_refused_before_the_model_is_loaded(folder, capsys):
    line = refusal(capsys, *flags(folder, "none.csv", model="local-dir:nowhere"))
    assert "none.csv cannot be read: [Errno 2] No such file or directory" in line


def test_an_image_that_cannot_be_read_is_refused_and_an_earlier_output_kept(folder, weights, capsys, tmp_path):
    (tmp_path / "broken.png").write_bytes((folder / "val0.png").read_bytes()[:60])
    (tmp_path / "broken.csv").write_text(
        f"filepath,title\n{folder / 'val1.png'},a\n{tmp_path / 'broken.png'},a dog\n", encoding="utf-8"
    )
    (tmp_path / "out.json").write_text("earlier", encoding="utf-8")
    line = refusal(capsys, *flags(folder, tmp_path / "broken.csv", output=tmp_path / "out.json"))
    assert f"{tmp_path / 'broken.png'} cannot be read as an image" in line
    assert (tmp_path / "out.json").read_text(encoding="utf-8") == "earlier"


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("batch-size", "0", "argument --batch-size is 0; expected a number of at least 1"),
        ("workers", "-1", "argument --workers is -1; expected a number of at least 0"),
        ("sparc-threshold", "1.5", "argument --sparc-threshold is 1.5; expected a number between 0 and 1"),
        (
            "sparc-fine-grained-scale",
            "nan",
            "argument --sparc-fine-grained-scale is nan; expected a finite number of at least 0",
        ),
        ("background-threshold", "2", "argument --background-threshold is 2.0; expected a number between -1 and 1"),
        (
            "output",
            "no/folder/out.json",
            "argument --output: 'no/folder/out.json' is in no folder that can be written",
        ),
        ("output", ".", "argument --output: '.' is a folder; expected a file"),
        ("protocol", "sclip", "argument --protocol: given with --data; it is for --suite only"),
        ("background-threshold", 0.1, "argument --background-threshold: given, but "),
        ("device", "gpu", "argument --device: 'gpu' cannot be used ("),
    ],
)
def test_flags_that_make_no_sense_are_refused(folder, weights, capsys, flag, value, message):
    assert message in refusal(capsys, *flags(folder, **{flag: value}))


FEW_FILES = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)); "


@pytest.mark.slow
def test_images_take_no_file_descriptor_each(folder, weights, tmp_path):
    lines = ["filepath,title"]
    for number in range(520):
        Image.new("RGB", (4, 4), (number % 256, number // 256, 0)).save(tmp_path / f"{number}.png")
        lines.append(f"{tmp_path / f'{number}.png'},a scene")
    (tmp_path / "many.csv").write_text("\n".join(lines), encoding="utf-8")
    options = {"batch-size": 256, "workers": 4, "output": tmp_path / "out.json"}
    finished = run_python("-c", FEW_FILES + SCRIPT, "evaluate", *flags(folder, tmp_path / "many.csv", **options))
    assert finished.returncode == 0, finished.stdout
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["images"] == 520


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "RuntimeError: DataLoader worker (pid"),
        pytest.param("os._exit(3)", "RuntimeError: DataLoader worker (pid", marks=pytest.mark.exhaustive),
        pytest.param(
            "exec('raise MemoryError')", "val5.png cannot be read: MemoryError", marks=pytest.mark.exhaustive
        ),
        ("exec('raise KeyError(1)')", "val5.png cannot be read: KeyError: 1"),
    ],
)
def test_a_worker_that_ends_is_one_line(folder, weights, tmp_path, end, reason):
    # Where a child were left behind, the run would not be over: it holds its output open.
    script = f"""
import os, signal
import sparc_loss.evaluation.image_batches as module
read = module.read_image
module.read_image = lambda path: {end} if path.name == "val5.png" else read(path)
"""
    options = {"workers": 2, "batch-size": 2, "output": tmp_path / "out.json"}
    finished = run_python("-c", script + SCRIPT, "evaluate", *flags(folder, **options))
    assert finished.returncode == 2, finished.stdout
    line = finished.stdout.splitlines()[-1]
    assert line.startswith("sparc-loss evaluate: error: ")
    assert reason in line
    assert "Traceback" not in finished.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("prompt", ["a photo", "a {} or {}", "a {name}", "a {"])
def test_a_prompt_without_its_one_place_for_the_class_is_refused(folder, capsys, tmp_path, prompt):
    (tmp_path / "templates.txt").write_text(f"{prompt}\n", encoding="utf-8")
    line = refusal(capsys, *flags(folder, templates=tmp_path / "templates.txt"))
    assert f"has the prompt {prompt!r}; expected one {{}} in each line, for the class" in line


@pytest.mark.slow
def test_without_open_clip_the_error_names_the_install_command(folder):
    script = "import sys; sys.modules.update(dict.fromkeys(['open_clip', 'PIL', 'numpy', 'tqdm'])); " + SCRIPT
    finished = run_python("-c", script, "evaluate", *flags(folder))
    assert finished.returncode == 2
    line = finished.stdout.splitlines()[-1]
    assert line.startswith("sparc-loss evaluate: error: what it needs cannot be imported (")
    assert "pip install 'sparc-loss[train]'" in line


def test_help_tells_the_columns(capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "hard_negative  a caption like title, but wrong of the image" in printed
    assert "--background-threshold X" in printed


def test_nothing_is_left_where_the_json_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        command.write_json(Path(tmp_path / "out.json"), {"value": float("nan")})
    assert list(tmp_path.iterdir()) == []
