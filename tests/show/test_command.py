"""`sparc-loss show`."""

import json
import re

import numpy as np
import open_clip
import pytest
import torch
from launching import MODEL_CONFIG, run_python, write_model
from PIL import Image

from sparc_loss.show import align, alignment_page, draw
from sparc_loss.show.command import main

CAPTION = "a red dog!"
SHOW = ("-c", "import sys; from sparc_loss.cli import main; sys.exit(main())", "show")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A picture, a model's folder without weights, a training's checkpoint of it, and a folder with its weights."""
    folder = tmp_path_factory.mktemp("show")
    write_model(folder / "bare", MODEL_CONFIG)
    write_model(folder / "model", MODEL_CONFIG)
    torch.manual_seed(0)
    weights = open_clip.CLIP(**MODEL_CONFIG).state_dict()
    torch.save(weights, folder / "model" / "open_clip_pytorch_model.bin")
    wrapped = {f"module.{name}": value for name, value in weights.items()}
    torch.save({"epoch": 1, "name": "run", "state_dict": wrapped, "optimizer": {}}, folder / "epoch_1.pt")
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "dog.png")
    return folder


def aligned(folder, caption: str = CAPTION):
    name = f"local-dir:{folder / 'model'}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    return align(folder / "dog.png", caption, model, preprocess, open_clip.get_tokenizer(name))


def arguments(folder, *more: str, output: str, model: str = "model", image: str = "dog.png") -> list[str]:
    return [
        *(str(folder / image), CAPTION, *more),
        *("--model", f"local-dir:{folder / model}", "-o", str(folder / output)),
    ]


@pytest.mark.slow
def test_a_training_checkpoint_becomes_a_picture(folder):
    finished = run_python(
        *SHOW, *arguments(folder, output="words.png", model="bare"), "--pretrained", str(folder / "epoch_1.pt")
    )
    assert finished.returncode == 0, finished.stdout
    assert finished.stdout.splitlines()[-1] == str(folder / "words.png")
    draw([aligned(folder)]).savefig(folder / "expected.png")
    shown, expected = (np.asarray(Image.open(folder / name)) for name in ("words.png", "expected.png"))
    np.testing.assert_array_equal(shown, expected)


def test_pairs_become_one_page(folder):
    other = "two 狗"
    assert main(arguments(folder, str(folder / "dog.png"), other, output="words.html")) == 0
    page = (folder / "words.html").read_text(encoding="utf-8")
    assert page == alignment_page([aligned(folder), aligned(folder, other)])


def test_the_options_reach_the_weights(folder):
    options = ("--threshold", "0.9", "--alignment", "sparse", "--reading", "value")
    main([*arguments(folder, output="high.html"), *options])
    page = (folder / "high.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'<script type="application/json">(.*?)</script>', page)[1])
    name = f"local-dir:{folder / 'model'}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    pair = align(folder / "dog.png", CAPTION, model, preprocess, tokenizer, threshold=0.9, reading="value")
    np.testing.assert_allclose(data["weights"], pair.weights.flatten(1), rtol=1e-3)


@pytest.mark.slow
def test_the_locale_need_not_be_utf_8(folder):
    """The page's parts are read, and the page is written, in UTF-8."""
    argv = ["show", str(folder / "dog.png"), "süß!", *arguments(folder, output="locale.html")[2:]]
    code = f"import sys; from sparc_loss.cli import main; sys.exit(main({argv!a}))"
    finished = run_python("-c", code, env={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
    assert finished.returncode == 0, finished.stdout
    assert "süß" in (folder / "locale.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("suffix", ["pdf", "svg", "PNG"])
def test_pictures_are_in_the_format_of_their_name(folder, suffix):
    assert main([*arguments(folder, output=f"words.{suffix}"), "--smooth"]) == 0
    first = (folder / f"words.{suffix}").read_bytes()[:5]
    assert first == {"pdf": b"%PDF-", "svg": b"<?xml", "PNG": b"\x89PNG\r"}[suffix]


def refusal(capsys, *argv: str) -> str:
    """The one line of error of a command that must fail with argparse's exit code."""
    with pytest.raises(SystemExit) as exited:
        main(list(argv))
    assert exited.value.code == 2
    *_, error = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("sparc-loss show: error: ")
    return error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "none.png"}, "none.png cannot be read as an image: .*No such file"),
        ({"image": "epoch_1.pt"}, "epoch_1.pt cannot be read as an image: cannot identify"),
        ({"output": "words.txt"}, "argument -o/--output: '.*words.txt' given; expected a name that ends in .png, "),
        ({"output": "none/words.png"}, "argument --output: '.*none/words.png' is in no folder that can be written to"),
        ({"model": "bare"}, "local-dir:.*bare cannot be loaded: RuntimeError: Required pretrained weights"),
        ({"model": "none"}, "local-dir:.*none cannot be loaded: FileNotFoundError: "),
    ],
)
def test_what_cannot_be_shown_is_one_error(folder, capsys, change, message):
    assert re.search(message, refusal(capsys, *arguments(folder, **{"output": "never.png", **change})))
    assert not (folder / "never.png").exists()


@pytest.mark.slow
def test_an_empty_caption_is_one_error_of_a_process(folder):
    argv = arguments(folder, output="never.png")
    argv[1] = " "
    finished = run_python(*SHOW, *argv)
    assert finished.returncode == 2
    assert finished.stdout.splitlines()[-1] == "sparc-loss show: error: caption is ' '; expected at least one word"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["dog.png", "--model", "ViT-B-32", "-o", "x.png"], "1 arguments given; expected an image and a caption"),
        (
            ["{}/dog.png", "a", "--model", "RN50-quickgelu", "-o", "x.png"],
            "argument --pretrained: not given, and RN50-quickgelu has no default weights; expected openai",
        ),
        (
            ["{}/dog.png", "a", "--model", "ViT-B-23", "--pretrained", "{}/epoch_1.pt", "-o", "x.png"],
            "argument --model: 'ViT-B-23' is no model of open_clip; expected one of open_clip.list_models()",
        ),
        (
            ["{}/dog.png", "a", "--model", "local-dir:{}/model", "--pretrained", "none.pt", "-o", "x.png"],
            "argument --pretrained: 'none.pt' is no file; expected a file of weights",
        ),
        (
            ["{}/dog.png", "a", "--model", "local-dir:{}/model", "--threshold", "2", "-o", "x.png"],
            "threshold is 2.0; expected a number between 0 and 1",
        ),
    ],
)
def test_wrong_arguments_are_one_error(folder, capsys, argv, message):
    assert message in refusal(capsys, *(argument.format(folder) for argument in argv))


def test_weights_of_another_model_are_one_error(folder, capsys):
    torch.save({"state_dict": {"some": torch.zeros(1)}}, folder / "other.pt")
    (folder / "text.pt").write_text("no weights", encoding="utf-8")
    for name in ("other.pt", "text.pt"):
        argv = [*arguments(folder, output="never.png"), "--pretrained", str(folder / name)]
        assert "cannot be loaded: " in refusal(capsys, *argv)


class TestData:
    def write(self, folder, *boxes):
        rows = ["filepath\ttitle\tboxes", *(f"{folder / 'dog.png'}\t{CAPTION}\t{each}" for each in boxes)]
        (folder / "pairs.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
        return folder / "pairs.csv"

    def show(self, folder, *more):
        return main(
            [
                *(*more, "--model", f"local-dir:{folder / 'model'}", "--pretrained", str(folder / "epoch_1.pt")),
                *("-o", str(folder / "data.html")),
            ]
        )

    def test_the_first_pairs_of_a_csv_are_shown_with_their_boxes(self, folder):
        box = '[{""phrase"": ""dog"", ""box"": [0, 0, 30, 30], ""words"": [2]}]'
        path = self.write(folder, f'"{box}"', "", "")
        self.show(folder, "--data", str(path), "--number", "2")
        page = (folder / "data.html").read_text(encoding="utf-8")
        first, second = re.findall(r"data:image/png;base64,[^\"]+", page)
        assert first != second  # the first has a box

    @pytest.mark.parametrize(
        ("boxes", "more", "message"),
        [
            (["nonsense"], (), "pairs.csv, line 2: boxes is 'nonsense' (JSONDecodeError"),
            ([], (), "pairs.csv has no pair; expected at least one"),
            ([""], ("--number", "0"), "argument --number: 0 given; expected 1 or more"),
            ([""], ("dog.png", "a dog"), "expected either an image and a caption, or several such pairs, or --data"),
        ],
        ids=["boxes", "empty", "number", "both"],
    )
    def test_bad_arguments_are_one_error(self, folder, boxes, more, message, capsys):
        path = self.write(folder, *boxes)
        with pytest.raises(SystemExit, match="2"):
            self.show(folder, "--data", str(path), *more)
        assert message in capsys.readouterr().err

    def test_neither_pairs_nor_data_is_an_error(self, folder, capsys):
        with pytest.raises(SystemExit, match="2"):
            self.show(folder)
        assert "expected either an image and a caption" in capsys.readouterr().err
