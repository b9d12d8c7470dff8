"""README says what is so."""

import re
from pathlib import Path

from launching import run_python

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
