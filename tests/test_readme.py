"""README says what is so."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
from launching import run_python
from model_families import text_family, vision_family
from open_clip.factory import get_model_config

from sparc_loss.integration.versions import TESTED

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_loop_prints_what_readme_shows():
    (code,) = blocks("python")
    finished = run_python("-c", code)
    assert finished.returncode == 0, finished.stdout
    shown = README.split(code)[1].split("```text\n")[1].split("```")[0]
    assert finished.stdout.endswith(shown)


def test_the_flags_are_those_of_help():
    (shown,) = [block for block in blocks("text") if block.startswith("SPARC:")]
    finished = run_python("-m", "sparc_loss.train", "--help", env={"COLUMNS": "80"})
    assert shown in finished.stdout


def test_the_links_lead_somewhere():
    links = re.findall(r"\]\((?!https?://)([^)#]+)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_map_names_what_is_there():
    (shown,) = [block for block in blocks("text") if block.startswith("src/sparc_loss/")]
    names = re.findall(r"^(\s*)(\S+)", shown, re.MULTILINE)
    package = ROOT / "src" / "sparc_loss"
    missing = [name for indent, name in names if not ((package if indent else ROOT) / name).exists()]
    assert missing == []


@pytest.mark.skipif(
    open_clip.__version__ != TESTED[-1], reason="README lists the models of the newest open_clip tested"
)
@pytest.mark.parametrize(("tower", "family"), [("image", vision_family), ("text", text_family)])
def test_the_table_of_models_is_open_clips_list(tower: str, family: Callable[[dict], str]):
    table = README.split(f"| {tower} tower |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:]]
    models = open_clip.list_models()
    assert f"All {len(models)} of `open_clip.list_models()`" in README
    counts = Counter(family(get_model_config(name)) for name in models)
    assert {name: int(number) for name, number, *_ in rows} == counts
    assert all(family(get_model_config(example)) == name for name, _, example, _ in rows)
