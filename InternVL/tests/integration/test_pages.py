"""Statements of the documentation that can be checked: links, names, messages, flags and numbers."""

import ast
import re
import runpy
from functools import cache
from pathlib import Path

import pytest
from helpers import SOURCE_ROOT
from integration.test_documentation import DOCS, PAGES, REPOSITORY

from internvl_chat.eval.report.published import OPEN, PUBLISHED, published

PACKAGE = SOURCE_ROOT / "internvl_chat"
TESTS = SOURCE_ROOT / "tests"
ALL_PAGES = [*PAGES, SOURCE_ROOT / "CHANGELOG.md", SOURCE_ROOT / "benchmarks/README.md"]
REFERENCE = "README.md#the-reference"


def prose(page: Path) -> str:
    """Return the text of a page without code blocks."""
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


@cache
def anchors(page: Path) -> set[str]:
    """Return the heading anchors of a page as GitHub generates them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_the_reference_is_defined_once(page):
    """A page that mentions the reference links to its definition in the README."""
    text = re.sub(r"\s+", " ", prose(page))
    if page == REPOSITORY / "README.md":
        assert text.count("*the reference* is") == 1
    elif re.search(r"\bthe reference\b", text):
        assert REFERENCE in text


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_no_paragraph_occurs_twice(page):
    paragraphs = [text.strip() for text in re.split(r"\n\s*\n", prose(page))]
    long = [text for text in paragraphs if len(text) > 60 and not text.startswith("|")]
    assert len(long) == len(set(long))


def test_flags_page_is_current():
    module = runpy.run_path(str(DOCS / "make_flags.py"))
    current = (DOCS / "flags.md").read_text(encoding="utf-8")
    assert current == module["flags_page"](), f"flags.md is out of date: run {module['COMMAND']}"


@cache
def messages() -> list[str]:
    """Return the strings of the package, with `…` for the values of f-strings, and the shell scripts."""
    texts = []
    for file in PACKAGE.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                texts.append("".join(parts))
            elif (
                isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
            ):
                texts.append(node.value)
    return texts + [file.read_text(encoding="utf-8") for file in (PACKAGE / "shell").rglob("*.sh")]


def test_troubleshooting_names_real_messages():
    rows = re.findall(
        r"^\| `(.+?)` \|", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(rows) > 30
    patterns = {row: re.compile(".*".join(map(re.escape, row.split("…"))), re.DOTALL) for row in rows}
    assert [row for row, pattern in patterns.items() if not any(map(pattern.search, messages()))] == []


def cells(page: Path, heading: str) -> list[list[str]]:
    """Return the rows of the table below a heading."""
    section = prose(page).split(f"\n## {heading}\n")[1].split("\n## ")[0]
    table = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


@pytest.mark.parametrize("heading", ["The path of one record", "Where things are", "How to add something"])
def test_architecture_page_names_real_files(heading):
    """Each file exists and contains the names in parentheses after it; its tests exist as well."""
    rows = cells(DOCS / "architecture.md", heading)
    assert len(rows) > 9
    for row in rows:
        for name, names in re.findall(r"`([\w/.]+\.(?:py|yaml))`(?: \(((?:`[\w.]+`[^`)]*)+)\))?", row[1]):
            file = PACKAGE / name
            assert file.is_file() or (REPOSITORY / name).is_file(), name
            for symbol in re.findall(r"`([\w.]+)`", names):
                for part in symbol.split("."):
                    assert re.search(rf"\b{part}\b", file.read_text(encoding="utf-8")), f"{name}: {part}"
        for folder in re.findall(r"`([\w/]+/)`", row[1]):
            assert (PACKAGE / folder).is_dir(), folder
        if heading == "How to add something":
            tests = re.findall(r"`([\w/]+\.py)`", row[2])
            assert tests and all((TESTS / test).is_file() for test in tests), row[2]


def test_architecture_page_names_every_folder():
    named = {
        name
        for row in cells(DOCS / "architecture.md", "The tree")
        for name in re.findall(r"`(\S+)/`", row[0])
    }
    folders = {file.parent.relative_to(PACKAGE).as_posix() for file in PACKAGE.rglob("*.py")} - {"."}
    # Folders that the page describes as part of their parent folder.
    parts = {
        "commands/data",
        "commands/inference",
        "data",
        "model/kernels/cpu",
        "utils/doctor",
        "eval/benchmarks",
        "eval/report",
        "eval/lmms_eval_tasks",
    }
    assert named - {"shell"} == folders - parts


def test_published_results_in_the_readme():
    tasks = ("multisubimageVQA", "single-subimageVQA", "puretext", "multi-choice")
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    for model in PUBLISHED:
        shown = []
        for task in tasks:
            names = OPEN if task != "multi-choice" else ("accuracy",)
            shown.append(" / ".join(f"{published(model, task, name):.1f}" for name in names))
        assert f"| {model} | {' | '.join(shown)} |" in text
