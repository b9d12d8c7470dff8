"""README and docs/ show commands, code and output that are true."""

import re
import shlex
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
from launching import run_python
from model_families import text_family, vision_family
from open_clip.factory import get_model_config

from sparc_loss.open_clip_versions import TESTED

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
REPOSITORY = "https://github.com/sparc-loss/sparc-loss/blob/main/"
RAW = "https://raw.githubusercontent.com/sparc-loss/sparc-loss/main/"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The fenced code of a language, also where it is indented in a list."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", code, flags=re.MULTILINE) for indent, code in found]


def test_the_loop_in_readme_prints_what_readme_shows():
    (code,) = blocks(README, "python")
    finished = run_python("-c", code)
    assert finished.returncode == 0, finished.stdout
    shown = README.split(code)[1].split("```text\n")[1].split("```")[0]
    assert finished.stdout.endswith(shown)


def test_the_python_of_the_docs_runs(tmp_path: Path):
    needs_a_checkpoint = "logs/RUN/"
    pages = [page for page in PAGES if page.name != "README.md"]
    code = [block for page in pages for block in blocks(page.read_text(encoding="utf-8"), "python")]
    finished = run_python("-c", "\n".join(block for block in code if needs_a_checkpoint not in block))
    assert finished.returncode == 0, finished.stdout


def commands() -> list[tuple[str, list[str]]]:
    """Every command of ours that a page shows, with its page."""
    found = []
    for page in PAGES:
        for block in blocks(page.read_text(encoding="utf-8"), "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                for start in (["-m", "sparc_loss.train"], ["sparc-loss", "evaluate"], ["sparc-loss", "show"]):
                    if any(words[i : i + 2] == start for i in range(len(words))):
                        found.append((page.name, words[words.index(start[-1]) :]))
    return found


def test_the_flags_of_every_command_in_the_docs_exist():
    def parsed(words: list[str]) -> list[str]:
        from open_clip_train import params

        from sparc_loss.evaluation import command as evaluate
        from sparc_loss.plugins.sparc import SPARC
        from sparc_loss.show import command as show

        if words[0] == "sparc_loss.train":
            parser = ArgumentParser(allow_abbrev=False)
            parser.add_argument("--loss")
            SPARC.add_arguments(parser)
            _, rest = parser.parse_known_args(words[1:])
            params.parse_args([word for word in rest if word != "..."])
            return []
        return {"evaluate": evaluate, "show": show}[words[0]]._parser().parse_known_args(words[1:])[1]

    found = commands()
    assert len(found) > 8
    for page, words in found:
        assert [word for word in parsed(words) if word != "..."] == [], f"{page}: {words}"


def test_the_flags_in_the_docs_are_those_of_help():
    (shown,) = [block for block in blocks(text_of("docs/training.md"), "text") if block.startswith("SPARC:")]
    finished = run_python("-m", "sparc_loss.train", "--help", env={"COLUMNS": "80"})
    assert shown in finished.stdout


def test_readme_has_absolute_links_only_and_they_lead_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", README)
    relative = [link for link in links if not link.startswith(("https://", "#"))]
    assert relative == []
    ours = [link.removeprefix(start) for link in links for start in (REPOSITORY, RAW) if link.startswith(start)]
    assert len(ours) > 10
    assert [link for link in ours if not (ROOT / link.split("#")[0]).exists()] == []


def test_readme_is_short():
    assert len(README.split()) <= 950


@pytest.mark.skipif(
    open_clip.__version__ != TESTED[-1], reason="docs/models.md lists the models of the newest open_clip tested"
)
@pytest.mark.parametrize(("tower", "family"), [("image", vision_family), ("text", text_family)])
def test_the_table_of_models_is_open_clips_list(tower: str, family: Callable[[dict], str]):
    table = text_of("docs/models.md").split(f"| {tower} tower |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:]]
    models = open_clip.list_models()
    for page in ("README.md", "docs/models.md"):
        assert f"ll {len(models)} of `open_clip.list_models()`" in text_of(page)
    counts = Counter(family(get_model_config(name)) for name in models)
    assert {name: int(number) for name, number, *_ in rows} == counts
    assert all(family(get_model_config(example)) == name for name, _, example, _ in rows)


@pytest.mark.parametrize(
    ("title", "plan"),
    [
        ("The recipe", "recipe"),
        ("What was tried on the way", "candidates"),
        ("A second world", "emoji"),
        ("A tenth of the weights", "tenth"),
        ("The objectives in the second world", "emoji-objectives"),
        ("Larger, on a GPU", "gpu"),
        ("Downstream", "downstream"),
    ],
)
def test_the_tables_of_the_study_are_those_of_the_committed_runs(title, plan):
    section = text_of("docs/study.md").partition(f"## {title}")[2].partition("\n## ")[0]
    shown = [line for line in section.splitlines() if line.startswith("|")]
    assert len(shown) > 7
    assert set(shown) <= set(text_of(f"examples/study/results/{plan}/tables.md").splitlines())
