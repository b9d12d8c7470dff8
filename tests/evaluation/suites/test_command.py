"""`sparc-loss evaluate --suite`: each benchmark on a made data set in its real layout, and what is refused."""

import json
import os
import shutil

import numpy as np
import open_clip
import pytest
import suite_trees
import torch
from launching import MODEL_CONFIG, RESNET_CONFIG, run_python, write_model
from PIL import Image
from suite_trees import NAMES, TREES

from sparc_loss import cli
from sparc_loss.evaluation import command
from sparc_loss.evaluation.suites import SUITES

RETRIEVAL = [f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
SUBSETS = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
FIGURES = {
    **{name: ["mean_iou"] for name, suite in SUITES.items() if suite.protocols},
    "coco": [*RETRIEVAL, "k_precision"],
    "flickr30k": [*RETRIEVAL, "k_precision"],
    "sugarcrepe": [f"{subset}/hard_negative_accuracy" for subset in SUBSETS],
    "aro": [f"{part}/hard_negative_accuracy{of}" for part in ("relation", "attribution") for of in ("", "_of_groups")],
    "imagenet": ["zero_shot_top1", "zero_shot_top5"],
    "flickr30k-entities": ["phrase_pointing", "phrase_tokens_pointing", "word_pointing"],
}
IMAGES = {"cityscapes": 2, "coco": 11, "flickr30k": 11, "flickr30k-entities": 2}
SMALL = ("--short-side", "40", "--window", "32", "--stride", "16")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    write_model(folder, MODEL_CONFIG)
    torch.manual_seed(0)
    weights = open_clip.create_model(f"local-dir:{folder}").state_dict()
    torch.save(weights, folder / "open_clip_pytorch_model.bin")
    return folder


@pytest.fixture
def evaluate(model, tmp_path, capsys):
    """Run the command on the made data of the suites; returns its code and what it printed."""

    def run(suites, *flags, build=True, **changes):
        for tree in dict.fromkeys(TREES[suite] for suite in suites.split(",")) if build else ():
            tree(tmp_path / "data")
        small = SMALL if any(SUITES[suite].protocols for suite in suites.split(",")) else ()
        named = {
            "suite": suites,
            "data-root": tmp_path / "data",
            "model": f"local-dir:{model}",
            "device": "cpu",
            "workers": 0,
            "output": tmp_path / "figures.json",
            **changes,
        }
        argv = [part for name, value in named.items() if value is not None for part in (f"--{name}", str(value))]
        code = cli.main(["evaluate", *argv, *small, *flags])
        return code, capsys.readouterr()

    return run


@pytest.fixture
def refusal(evaluate, capsys):
    """The one line with which it stops, with code 2 and nothing on standard output."""

    def run(suites, *flags, **options):
        with pytest.raises(SystemExit) as stopped:
            evaluate(suites, *flags, **options)
        assert stopped.value.code == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        line = printed.err.splitlines()[-1]
        assert line.startswith("sparc-loss evaluate: error: ")
        return line.removeprefix("sparc-loss evaluate: error: ")

    return run


def records(tmp_path):
    return json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))["suites"]


@pytest.mark.parametrize("suite", list(TREES))
def test_each_suite_by_its_command(evaluate, tmp_path, suite):
    code, printed = evaluate(suite)
    assert code == 0
    record = records(tmp_path)[suite]
    assert list(record["figures"]) == FIGURES[suite]
    rows = [line for line in printed.out.splitlines() if line.startswith(f"| {suite} ")]
    assert len(rows) == len(FIGURES[suite])
    for row, figure in zip(rows, record["figures"].values(), strict=True):
        cells = [cell.strip() for cell in row.split("|")[1:-1]]
        assert cells[2:4] == [f"{100 * figure['value']:.1f}", f"{100 * figure['chance']:.1f}"]
        assert cells[5:] == [str(figure["images"]), record["protocol"]]
        assert 0 <= figure["value"] <= 1
    if suite not in ("aro", "sugarcrepe"):
        assert {figure["images"] for figure in record["figures"].values()} == {IMAGES.get(suite, 3)}
    assert record["settings"]["versions"]["open_clip"] == open_clip.__version__


@pytest.mark.slow
def test_two_suites_as_a_real_process_with_workers(model, tmp_path):
    suite_trees.voc(tmp_path / "data")
    suite_trees.sugarcrepe(tmp_path / "data")
    arguments = ["--suite", "voc20,sugarcrepe", "--data-root", tmp_path / "data", "--model", f"local-dir:{model}"]
    script = "import sys; from sparc_loss import cli; sys.exit(cli.main())"
    finished = run_python("-c", script, "evaluate", *map(str, arguments), *SMALL, "--workers", "2", "--device", "cpu")
    assert finished.returncode == 0, finished.stdout
    assert "| voc20 " in finished.stdout
    assert "| sugarcrepe | swap_obj, accuracy " in finished.stdout


def test_the_list_has_every_suites_files_protocols_and_published_figures(capsys):
    assert command.main(["--list-suites"]) == 0
    printed = capsys.readouterr().out
    for name, suite in SUITES.items():
        assert f"\n{name}: {suite.title}\n" in f"\n{printed}"
        for path in suite.layout:
            assert f"    {path}\n" in printed
        for preset, protocol in suite.protocols.items():
            assert f"  --protocol {preset}: {protocol.describe()}\n" in printed
    assert "    mIoU 41.8, ViT-B-16 openai (ClearCLIP, github.com/mc-lan/ClearCLIP assets/results.png)\n" in printed
    assert "    retrieval R@1, text to image 33.1, ViT-B-16 openai (open_clip, docs/" in printed


def test_published_figures_stand_beside_with_their_sources(evaluate):
    _, printed = evaluate("voc20,imagenet", "--protocol", "clearclip")
    assert "| 80.9 ViT-B-16 openai [1] |" in printed.out
    assert "| 68.3 ViT-B-16 openai [2] |" in printed.out
    assert "\n[1] ClearCLIP, github.com/mc-lan/ClearCLIP assets/results.png\n[2] open_clip, docs/" in printed.out
    assert "reading clear" in printed.out
    assert "\nvoc20: the protocol differs from clearclip, with which the published figures were taken\n" in printed.out


def test_a_limit_is_said_in_the_table(evaluate, tmp_path):
    _, printed = evaluate("coco", "--limit", "2")
    assert "| 2 (--limit 2) |" in printed.out
    figures = records(tmp_path)["coco"]["figures"]
    assert list(figures) == ["image_to_text_R@1", "text_to_image_R@1", "k_precision"]
    assert figures["text_to_image_R@1"]["count"] == 10


def test_what_is_left_out_is_said(evaluate):
    _, printed = evaluate("coco,flickr30k-entities")
    assert "\ncoco: left out: 1 without a caption\n" in printed.out
    assert "\nflickr30k-entities: 4 of 10 phrases have no box and are left out\n" in printed.out


def test_fields_of_the_protocol_by_flags(evaluate, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"thing {index}, object {index}" for index in range(20)), encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("a {}\n{}\n", encoding="utf-8")
    flags = {
        "reading": "value",
        "logit-scale": 30,
        "background-threshold": 0.05,
        "minimal-area": 0.01,
        "classes-offered": "present",
        "classes": names,
        "templates": tmp_path / "prompts.txt",
    }
    evaluate("voc21", **flags)
    protocol = records(tmp_path)["voc21"]["settings"]["protocol"]
    assert protocol["classes"][0] == ["thing 0", "object 0"]
    assert protocol["templates"] == ["a {}", "{}"]
    expected = {"short_side": 40, "window": 32, "stride": 16, "reading": "value", "logit_scale": 30.0}
    expected |= {"background_threshold": 0.05, "minimal_area": 0.01, "classes_offered": "present"}
    assert {name: protocol[name] for name in expected} == expected


def test_other_values_of_masks_can_be_ignored(evaluate, tmp_path, capsys):
    evaluate("voc20", "--ignored-values", "0", "255", "20")
    protocol = records(tmp_path)["voc20"]["settings"]["protocol"]
    assert protocol["ignored_values"] == [0, 255, 20]
    assert records(tmp_path)["voc20"]["protocol"].endswith(", ignored 0, 255, 20")
    with pytest.raises(SystemExit):
        evaluate("voc20", "--ignored-values", "0")
    assert "has the value 255; expected 1 to 20 (classes) or 0" in capsys.readouterr().err


def test_the_iou_of_each_class_is_in_the_json(evaluate, tmp_path):
    evaluate("voc21")
    assert {"aeroplane", "tvmonitor", "background"} <= set(records(tmp_path)["voc21"]["iou_of_classes"])


# Interrupted and gone on


def test_known_figures_are_not_measured_again(evaluate, monkeypatch):
    _, first = evaluate("voc20,coco")
    monkeypatch.setattr(command, "load_model", lambda _: pytest.fail("the model was loaded"))
    _, second = evaluate("voc20,coco")
    assert second.out == first.out


def test_other_settings_are_measured_again(evaluate, tmp_path):
    evaluate("voc20")
    before = records(tmp_path)["voc20"]
    evaluate("voc20", "--limit", "1")
    after = records(tmp_path)["voc20"]
    assert after["figures"]["mean_iou"]["images"] == 1
    assert before["figures"]["mean_iou"]["images"] == 3


def test_another_checkpoint_in_the_folder_of_the_model_is_measured_again(evaluate, model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    name = f"local-dir:{tmp_path / 'model'}"
    evaluate("voc20", model=name)
    weights = tmp_path / "model" / "open_clip_pytorch_model.bin"
    os.utime(weights, (0, 0))
    _, printed = evaluate("voc20", model=name)
    assert "known from an earlier run" not in printed.err
    assert records(tmp_path)["voc20"]["settings"]["weights"][str(weights.resolve())]["modified"] == 0


def test_suites_that_another_command_wrote_meanwhile_are_kept(evaluate, tmp_path, monkeypatch):
    from sparc_loss.evaluation.suites import run as module

    measure = module._measure

    def measured(*arguments):
        output = {"suites": {"coco": {"of": "another command"}}}
        (tmp_path / "figures.json").write_text(json.dumps(output), encoding="utf-8")
        return measure(*arguments)

    monkeypatch.setattr(module, "_measure", measured)
    evaluate("voc20")
    assert list(records(tmp_path)) == ["coco", "voc20"]


def test_an_output_that_cannot_be_written_any_more_does_not_lose_the_figures(evaluate, monkeypatch):
    def no_space(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(command, "write_json", no_space)
    code, printed = evaluate("voc20,coco")
    assert code == 0
    assert "figures.json cannot be written: No space left on device" in printed.err
    assert "| coco " in printed.out


def test_other_data_are_measured_again(evaluate, tmp_path):
    evaluate("voc20")
    before = records(tmp_path)["voc20"]["settings"]
    (tmp_path / "data").rename(tmp_path / "moved")
    _, printed = evaluate("voc20", build=False, **{"data-root": tmp_path / "moved"})
    assert "known from an earlier run" not in printed.err
    after = records(tmp_path)["voc20"]["settings"]
    assert {name for name in after if after[name] != before[name]} == {"data_root"}
    (tmp_path / f"moved/VOCdevkit/VOC2012/JPEGImages/{NAMES[0]}.jpg").unlink()
    evaluate("voc20", "--skip-missing", build=False, **{"data-root": tmp_path / "moved"})
    assert records(tmp_path)["voc20"]["settings"]["images"] == {"": 2}


def test_an_interrupted_run_goes_on_with_the_suite_it_was_at(evaluate, tmp_path, monkeypatch):
    from sparc_loss.evaluation import evaluate as module

    with monkeypatch.context() as patched:
        patched.setattr(module, "evaluate", interrupt)
        code, printed = evaluate("voc20,coco")
    assert code == 130
    assert printed.out == ""
    output = tmp_path / "figures.json"
    assert printed.err.splitlines()[-1] == (
        f"sparc-loss evaluate: interrupted; the figures of the suites done are in {output}, and the same command goes "
        "on from there"
    )
    assert list(records(tmp_path)) == ["voc20"]
    _, printed = evaluate("voc20,coco")
    assert "voc20: known from an earlier run\ncoco: retrieval" in printed.err
    assert list(records(tmp_path)) == ["voc20", "coco"]


def interrupt(*_):
    raise KeyboardInterrupt


def test_an_interrupted_run_without_output_says_that_nothing_is_kept(evaluate, monkeypatch):
    from sparc_loss.evaluation import evaluate as module

    monkeypatch.setattr(module, "evaluate", interrupt)
    code, printed = evaluate("coco", output=None)
    assert code == 130
    last = printed.err.splitlines()[-1]
    assert last == "sparc-loss evaluate: interrupted; nothing is kept, as there is no --output"


def test_figures_of_other_suites_in_the_file_are_kept(evaluate, tmp_path):
    evaluate("voc20")
    evaluate("coco")
    assert list(records(tmp_path)) == ["voc20", "coco"]


def test_a_file_of_another_command_is_written_anew(evaluate, tmp_path):
    (tmp_path / "figures.json").write_text('{"measures": {}}', encoding="utf-8")
    evaluate("coco")
    assert list(records(tmp_path)) == ["coco"]


# Traps, all told before the model is loaded


@pytest.fixture
def no_model(monkeypatch):
    monkeypatch.setattr(command, "load_model", lambda _: pytest.fail("the model was loaded"))


@pytest.mark.parametrize("suite", list(TREES))
def test_a_suite_whose_files_are_not_there(refusal, tmp_path, no_model, suite):
    (tmp_path / "data").mkdir()
    line = refusal(suite, build=False)
    assert line.startswith(f"{suite}: there is no {tmp_path / 'data'}/")
    assert line.endswith(f"; expected in --data-root: {', '.join(SUITES[suite].layout)}")


def test_a_split_file_that_names_missing_images(refusal, tmp_path, no_model):
    suite_trees.voc(tmp_path / "data")
    base = tmp_path / "data/VOCdevkit/VOC2012"
    (base / f"JPEGImages/{NAMES[0]}.jpg").unlink()
    (base / f"SegmentationClass/{NAMES[0]}.png").unlink()
    (base / f"SegmentationClass/{NAMES[2]}.png").unlink()
    split, first = base / "ImageSets/Segmentation/val.txt", base / f"JPEGImages/{NAMES[0]}.jpg"
    assert refusal("voc20", build=False) == (
        f"voc20: {split} names {first}, which is not there, and 2 further files; --skip-missing leaves such images out"
    )


def test_missing_images_can_be_left_out_and_this_is_said(evaluate, tmp_path):
    suite_trees.voc(tmp_path / "data")
    missing = tmp_path / f"data/VOCdevkit/VOC2012/JPEGImages/{NAMES[1]}.jpg"
    missing.unlink()
    _, printed = evaluate("voc20", "--skip-missing", build=False)
    assert f"\nvoc20: 1 of 3 rows left out: {missing.parents[1]}/ImageSets/" in printed.out
    assert records(tmp_path)["voc20"]["figures"]["mean_iou"]["images"] == 2


def test_all_images_missing(refusal, tmp_path, no_model):
    suite_trees.voc(tmp_path / "data")
    shutil.rmtree(tmp_path / "data/VOCdevkit/VOC2012/JPEGImages")
    assert "which is not there, and 2 further files" in refusal("voc20", "--skip-missing", build=False)


def mask_of(tmp_path):
    return tmp_path / f"data/VOCdevkit/VOC2012/SegmentationClass/{NAMES[1]}.png"


@pytest.mark.parametrize(
    ("pixels", "text"),
    [
        (np.zeros((40, 24, 3)), "has mode RGB; expected 8 bits a pixel, grey or palette"),
        (np.zeros((40, 25)), "is [40, 25], its image [40, 24]; expected the same height and width"),
        (np.full((40, 24), 21), "has the value 21; expected 1 to 20 (classes) or 0 or 255"),
    ],
)
def test_a_broken_mask_of_the_last_suite(refusal, tmp_path, no_model, pixels, text):
    suite_trees.voc(tmp_path / "data")
    suite_trees.karpathy(tmp_path / "data")
    Image.fromarray(pixels.astype(np.uint8)).save(mask_of(tmp_path))
    assert refusal("coco,voc20", build=False) == f"{mask_of(tmp_path)} {text}"


def test_imagenet_without_one_of_its_folders(refusal, tmp_path, no_model):
    suite_trees.imagenet(tmp_path / "data")
    shutil.rmtree(tmp_path / "data/imagenet/val/n00000500")
    assert refusal("imagenet", build=False) == (
        f"imagenet: {tmp_path}/data/imagenet/val has 999 folders; expected 1000, one for each WNID"
    )


def test_imagenet_without_images(refusal, tmp_path, no_model):
    suite_trees.imagenet(tmp_path / "data")
    for path in (tmp_path / "data/imagenet/val").rglob("*.JPEG"):
        path.unlink()
    assert refusal("imagenet", build=False).endswith("has no image in its folders; expected at least one")


def test_a_json_that_is_none(refusal, tmp_path, no_model):
    suite_trees.sugarcrepe(tmp_path / "data")
    path = tmp_path / "data/sugar-crepe/data/swap_obj.json"
    path.write_text("{", encoding="utf-8")
    assert refusal("sugarcrepe", build=False).startswith(f"{path} cannot be read as JSON: Expecting property name")


@pytest.mark.parametrize(
    ("suite", "file", "content", "text"),
    [
        ("coco", "coco/dataset_coco.json", {"images": [{"split": "test"}]}, "images[] with filename, split and"),
        ("sugarcrepe", "sugar-crepe/data/add_att.json", [1], "rows with filename, caption and negative_caption"),
        ("aro", "aro/visual_genome_relation.json", [{"image_path": "1.jpg"}], "rows with image_path, bbox_x, bbox_y,"),
    ],
)
def test_a_json_of_another_form(refusal, tmp_path, no_model, suite, file, content, text):
    TREES[suite](tmp_path / "data")
    path = tmp_path / "data" / file
    path.write_text(json.dumps(content), encoding="utf-8")
    line = refusal(suite, build=False)
    assert line.startswith(f"{path} is not as published (")
    assert f"; expected {text}" in line


def test_a_list_without_an_image(refusal, tmp_path, no_model):
    suite_trees.karpathy(tmp_path / "data")
    path = tmp_path / "data/coco/dataset_coco.json"
    path.write_text('{"images": []}', encoding="utf-8")
    assert refusal("coco", build=False) == f"coco: {path} names no image; expected at least one"


def test_annotations_that_are_no_xml_and_phrases_without_a_box(refusal, tmp_path, no_model):
    suite_trees.flickr30k_entities(tmp_path / "data")
    annotations = tmp_path / "data/flickr30k_entities/Annotations"
    for path in annotations.iterdir():
        path.write_text("<annotation></annotation>", encoding="utf-8")
    split = annotations.parent / "test.txt"
    assert refusal("flickr30k-entities", build=False) == (
        f"flickr30k-entities: no phrase of {split} has a box in {annotations}; expected at least one"
    )
    (annotations / "1016887272.xml").write_text("<annotation>", encoding="utf-8")
    line = refusal("flickr30k-entities", build=False)
    assert line.startswith(f"{annotations}/1016887272.xml cannot be read as an annotation of Flickr30k Entities: ")


# Flags


@pytest.mark.parametrize(
    ("suites", "flags", "text"),
    [
        (
            "voc20",
            "--data x.csv",
            "arguments --data and --suite: both given; expected --data FILE.csv or --suite NAMES",
        ),
        ("coco", "--window 8", "argument --window: given, but none of the suites is of segmentation"),
        ("coco", "--reading self", "argument --reading: given, but none of the suites is of segmentation"),
        ("coco", "--limit 0", "argument --limit is 0; expected a number of at least 1"),
        ("voc20", "--stride 64", "stride is 64, window 32; expected a stride no larger, or pixels are left out"),
    ],
)
def test_flags_that_do_not_fit(refusal, no_model, suites, flags, text):
    assert refusal(suites, *flags.split()) == text


def test_suites_without_the_folder_of_their_data(refusal, no_model):
    line = refusal("voc20", **{"data-root": None})
    assert line == "argument --data-root: not given; expected the folder of the data sets of --suite"


def test_templates_for_suites_without_classes(refusal, tmp_path, no_model):
    (tmp_path / "prompts.txt").write_text("a {}\n", encoding="utf-8")
    line = refusal("coco", templates=tmp_path / "prompts.txt")
    assert line == "argument --templates: given, but none of the suites has classes"


def test_another_number_of_names_than_classes(refusal, tmp_path, no_model):
    (tmp_path / "names.txt").write_text("one\ntwo\n", encoding="utf-8")
    assert refusal("voc20", classes=tmp_path / "names.txt") == "argument --classes: 2 lines; voc20 has 20 classes"


def test_neither_data_nor_suite(capsys):
    with pytest.raises(SystemExit):
        command.main(["--model", "ViT-B-32"])
    assert "error: arguments --data and --suite: neither given; expected --data FILE.csv or" in capsys.readouterr().err


def test_an_unknown_suite(capsys, tmp_path, no_model):
    with pytest.raises(SystemExit):
        command.main(["--suite", "voc", "--data-root", str(tmp_path), "--model", "local-dir:x"])
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith(f"argument --suite: 'voc' is no suite; expected of {', '.join(SUITES)}, by commas")


def test_a_data_root_that_is_no_folder(refusal, tmp_path, no_model):
    line = refusal("voc20", build=False, **{"data-root": tmp_path / "none"})
    assert (
        line == f"argument --data-root: {str(tmp_path / 'none')!r} is no folder; expected the folder of the data sets"
    )


def test_flags_of_suites_with_a_csv(capsys, tmp_path):
    for flag in ("--window", "--limit", "--short-side"):
        with pytest.raises(SystemExit):
            command.main(["--data", "x.csv", "--model", "ViT-B-32", flag, "8"])
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.endswith(f"argument {flag}: given with --data; it is for --suite only")


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--csv-img-key", "image"), ("--csv-separator", ";"), ("--sparc-threshold", "0.5")],
)
def test_flags_of_a_csv_with_suites(refusal, no_model, flag, value):
    assert refusal("coco", flag, value) == f"argument {flag}: given with --suite; it is for --data only"


def test_nouns_and_adjectives_for_suites_without_k_precision(refusal, tmp_path, no_model):
    (tmp_path / "words.txt").write_text("red\n", encoding="utf-8")
    line = refusal("voc20", **{"nouns-and-adjectives": tmp_path / "words.txt"})
    assert line == "argument --nouns-and-adjectives: given, but none of the suites has K-Precision"


def test_a_reading_or_a_window_that_the_tower_does_not_take(evaluate, tmp_path, capsys):
    write_model(tmp_path / "resnet", RESNET_CONFIG)
    resnet = f"local-dir:{tmp_path / 'resnet'}"
    weights = open_clip.create_model(resnet).state_dict()
    torch.save(weights, tmp_path / "resnet" / "open_clip_pytorch_model.bin")
    for flags, text in (
        (("--reading", "value"), "model.visual is a ModifiedResNet, for which reading 'value' has no meaning"),
        ((), "model.visual is a ModifiedResNet, which takes images of 64 x 64 pixels only; found 32 x 32"),
    ):
        with pytest.raises(SystemExit):
            evaluate("voc20", *flags, model=resnet)
        assert text in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "figures.json").exists()
