"""Flickr30k Entities, test: the phrases of 5,000 captions, and the boxes of what they name.

    flickr30k_entities/test.txt
    flickr30k_entities/Sentences/*.txt
    flickr30k_entities/Annotations/*.xml
    flickr30k/flickr30k-images/*.jpg

Annotations from the repository BryanPlummer/flickr30k_entities, `annotations.zip` unpacked; the images from the
Flickr30k page of the University of Illinois. A phrase with several boxes is found in any of them. Phrases without a
box are left out: what is not visible, the scene as a whole, and what was not annotated.

    sparc-loss evaluate --suite flickr30k-entities --data-root DATA --model ViT-B-16 --pretrained openai
"""

import re
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from sparc_loss.evaluation.dataset import DataError, EvaluationData, read_lines
from sparc_loss.evaluation.suites.suite import DataFolder, Suite
from sparc_loss.named_objects import Box, NamedObject

# [/EN#283585/people/other An older man] is a phrase; its chain of coreference is 283585.
_PHRASE = re.compile(r"\[/EN#(\d+)(?:/\S+)? ([^\]]+)\]")


def _read(folder: DataFolder) -> Mapping[str, EvaluationData]:
    split = folder.find("flickr30k_entities/test.txt")
    sentences, annotations = (folder.find(f"flickr30k_entities/{name}") for name in ("Sentences", "Annotations"))
    images = folder.find("flickr30k/flickr30k-images", "flickr30k-images")
    data = EvaluationData([])
    rows = [
        (images / f"{name}.jpg", sentences / f"{name}.txt", annotations / f"{name}.xml") for name in read_lines(split)
    ]
    found = skipped = 0
    for image, texts, boxes in folder.existing(rows, lambda row: row, split):
        index, boxes_of = data.add_image(image), _boxes(boxes)
        for line in _sentences(texts):
            caption, phrases = _phrases(line)
            objects = tuple(
                NamedObject(phrase, box, words) for phrase, words, chain in phrases for box in boxes_of.get(chain, ())
            )
            boxed = sum(chain in boxes_of for _, _, chain in phrases)
            found, skipped = found + boxed, skipped + len(phrases) - boxed
            data.add_caption(index, caption, objects)
    data.notes.append(f"{skipped} of {found + skipped} phrases have no box and are left out")
    if not found:
        raise DataError(f"flickr30k-entities: no phrase of {split} has a box in {annotations}; expected at least one")
    return {"": data}


def _sentences(path: Path) -> list[str]:
    """The captions of an image, one of which may stand twice."""
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _phrases(line: str) -> tuple[str, list[tuple[str, tuple[int, ...], str]]]:
    """The caption without marks, and its phrases with their words' positions and their chains."""
    phrases = []
    words: list[str] = []
    end = 0
    for match in _PHRASE.finditer(line):
        words += line[end : match.start()].split()
        named = match[2].split()
        phrases.append((" ".join(named), tuple(range(len(words), len(words) + len(named))), match[1]))
        words += named
        end = match.end()
    words += line[end:].split()
    return " ".join(words), phrases


def _boxes(path: Path) -> dict[str, list[Box]]:
    """The boxes of each chain."""
    boxes: dict[str, list[Box]] = defaultdict(list)
    try:
        for thing in ET.parse(path).getroot().findall("object"):
            box = thing.find("bndbox")
            if box is None:
                continue
            left, top, right, bottom = (int(box.findtext(side, "")) for side in ("xmin", "ymin", "xmax", "ymax"))
            for name in thing.findall("name"):
                # The file counts pixels from 1, and its last ones are part of the box.
                boxes[name.text or ""].append((left - 1, top - 1, right, bottom))
    except (OSError, ET.ParseError, ValueError) as error:
        raise DataError(f"{path} cannot be read as an annotation of Flickr30k Entities: {error}") from error
    return dict(boxes)


FLICKR30K_ENTITIES = Suite(
    "flickr30k-entities",
    "pointing, Flickr30k Entities test",
    (
        "flickr30k_entities/{test.txt,Sentences/*.txt,Annotations/*.xml}",
        "flickr30k/flickr30k-images/*.jpg",
    ),
    _read,
    families=("pointing",),
    protocol="the image squashed to the model's size, the centre of the highest patch within any box of the phrase",
)
