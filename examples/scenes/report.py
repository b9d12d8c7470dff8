"""What the models of a run have learnt of the held-out scenes: a table, and what words select, as picture and page."""

import json
from collections.abc import Mapping
from pathlib import Path

import open_clip

from sparc_loss import surface_embeddings
from sparc_loss.show import align, alignment_page, draw

from .dataset import Annotations, read_annotations
from .measures import Embeddings, best_background_threshold, embed, levels, measure, measures_table, read_images


def embed_folder(folder: Path, scenes: Annotations) -> Embeddings:
    """Embed a split with the model of a local-dir folder."""
    name = f"local-dir:{folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    return embed(surface_embeddings(model, tokenizer), tokenizer, read_images(scenes, preprocess), scenes)


def write_report(run: Path, models: Mapping[str, Path], data: Path) -> str:
    """Measure the models on the test split; write results.json, table.md, words.png and words.html into `run`.

    Args:
        run: where to write.
        models: column of the table -> local-dir folder.
        data: what `write_dataset` wrote.

    Returns:
        The table, in Markdown.
    """
    val, test = read_annotations(data, "val"), read_annotations(data, "test")
    columns = {}
    for column, folder in models.items():
        threshold = best_background_threshold(embed_folder(folder, val), val)
        embedded = embed_folder(folder, test)
        columns[column] = measure(embedded, test, threshold)
    of_the_test = levels(embedded, test)
    columns["chance"] = {name: level.chance for name, level in of_the_test.items()}
    columns["ceiling"] = {name: level.ceiling for name, level in of_the_test.items()}
    (run / "results.json").write_text(json.dumps(columns, indent=2), encoding="utf-8")
    table = measures_table(columns)
    (run / "table.md").write_text(table, encoding="utf-8")
    show_words(run, {name: models[name] for name in ("CLIP", "recipe")}, test)
    return table


def show_words(run: Path, models: Mapping[str, Path], scenes: Annotations) -> None:
    """words.png: two scenes, the words that tell colour, kind or size of an object; words.html: six, all words."""
    loaded = {}
    for name, folder in models.items():
        model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        loaded[name] = model, preprocess, open_clip.get_tokenizer(f"local-dir:{folder}")
    chosen = first_scenes(scenes)
    pairs = [
        align(scenes.images[index], scenes.captions[index], *parts, title=name)
        for index in chosen
        for name, parts in loaded.items()
    ]
    said = {
        scenes.captions[index].split()[word].strip(",")
        for index in chosen
        for each in scenes.objects[index]
        for word in each.words.values()
    }
    drawn = 2 * len(models)
    draw(pairs[:drawn], words=said).savefig(run / "words.png", dpi=80)
    (run / "words.html").write_text(alignment_page(pairs), encoding="utf-8")


def first_scenes(scenes: Annotations, number: int = 6, objects: int = 3) -> list[int]:
    """The first scenes of so many objects: a rule, so that no picture is picked for its beauty."""
    return [index for index, each in enumerate(scenes.objects) if len(each) == objects][:number]
