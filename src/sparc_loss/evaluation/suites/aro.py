"""ARO, Visual Genome: 23,937 relations and 28,748 attributions, each caption against the one with two words swapped.

    aro/visual_genome_relation.json
    aro/visual_genome_attribution.json
    aro/images/*.jpg

From the repository mertyg/vision-language-models-are-bows, whose reader downloads them. Each row looks at one box of
its image. The authors' figure is the mean over relations, and over pairs of attributes with at least 25 rows. From
the mean over relations, their notebook of VG-Relation leaves out those in aro_relations_left_out.txt.

    sparc-loss evaluate --suite aro --data-root DATA --model ViT-B-16 --pretrained openai
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any

from sparc_loss.evaluation.dataset import EvaluationData
from sparc_loss.evaluation.suites.json_files import fields_of, read_json
from sparc_loss.evaluation.suites.suite import DataFolder, Suite, package_lines


def _read(folder: DataFolder) -> Mapping[str, EvaluationData]:
    left_out = frozenset(package_lines("aro_relations_left_out.txt"))
    return {
        "relation": _read_part(folder, "relation", lambda row: row["relation_name"], left_out),
        "attribution": _read_part(folder, "attribution", lambda row: "_".join(row["attributes"]), least=25),
    }


def _read_part(
    folder: DataFolder,
    part: str,
    group_of: Callable[[dict[str, Any]], str],
    left_out: Collection[str] = (),
    least: int = 1,
) -> EvaluationData:
    path, images = folder.find(f"aro/visual_genome_{part}.json"), folder.find("aro/images")
    data = EvaluationData([])
    with fields_of(path, "rows with image_path, bbox_x, bbox_y, bbox_w, bbox_h, true_caption and false_caption"):
        rows = folder.existing(read_json(path), lambda row: [images / row["image_path"]], path)
        groups = Counter(map(group_of, rows))
        for row in rows:
            left, top = row["bbox_x"], row["bbox_y"]
            crop = (left, top, left + row["bbox_w"], top + row["bbox_h"])
            group = group_of(row)
            data.add_caption(
                data.add_image(images / row["image_path"], crop=crop),
                row["true_caption"],
                hard_negative=row["false_caption"],
                group=group if groups[group] >= least and group not in left_out else None,
            )
    return data


ARO = Suite(
    "aro",
    "composition, ARO, relation and attribution",
    ("aro/visual_genome_relation.json", "aro/visual_genome_attribution.json", "aro/images/*.jpg"),
    _read,
    families=("hard_negatives",),
    protocol="each row cropped to its box, the right caption against one wrong one, no prompt, a tie is a miss",
)
