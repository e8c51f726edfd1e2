"""The floors of the house: no import runs upward, and slow optional libraries are imported when used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "internvl_chat"
# What each part may import beside itself.
ALLOWED = {
    "constants": set(),
    "utils": {"constants"},
    "metrics": {"constants", "utils"},
    "data": {"constants", "utils"},
    "model": {"constants", "utils"},
    "inference": {"constants", "utils", "model", "data"},
    "convert": {"constants", "utils", "model", "data", "inference"},
    "train": {"constants", "utils", "metrics", "data", "model", "inference", "convert"},
    "eval": {"constants", "utils", "metrics", "data", "model", "inference"},
    "commands": {"constants", "utils", "metrics", "data", "model", "inference", "convert", "eval"},
    "cli": {"constants", "utils", "commands", "train"},
}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imported(path: Path) -> set[str]:
    """Return the modules of this package that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return {name for name in names if name.startswith("internvl_chat.")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_import_runs_upward(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imported(path):
        other = name.split(".")[1]
        assert other == part or other in ALLOWED[part], f"{part} must not import {other}"


def test_no_circle():
    graph = {}
    for path in FILES:
        module = "internvl_chat." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        graph[module.removesuffix(".__init__")] = imported(path)
    state: dict[str, str] = {}

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert state.get(module) != "open", f"circle: {' -> '.join((*trail, module))}"
        if state.get(module) == "done":
            return
        state[module] = "open"
        for other in graph.get(module, ()):
            visit(other, (*trail, module))
        state[module] = "done"

    for module in graph:
        visit(module, ())
    assert all(value == "done" for value in state.values())


def test_package_imports_no_optional_library_by_itself():
    """transformers and accelerate may look for them; our own modules name them only inside functions."""
    optional = {"deepspeed", "wandb", "flash_attn", "timm", "matplotlib"}
    optional |= {"nltk", "rouge", "bert_score", "sentence_transformers", "sklearn", "pyarrow"}
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                assert not optional & {alias.name.split(".")[0] for alias in node.names}, path
            elif isinstance(node, ast.ImportFrom) and node.module:
                assert node.module.split(".")[0] not in optional, path


def test_every_public_function_and_file_is_documented():
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), f"{path} has no head"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node) or _is_private(tree, node), f"{path}: {node.name}"


def _is_private(tree: ast.Module, node: ast.AST) -> bool:
    """Say whether a definition is inside a function or a private class."""
    hidden = (
        outer
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef)
        or (isinstance(outer, ast.ClassDef) and outer.name.startswith("_"))
    )
    return any(outer is not node and node in ast.walk(outer) for outer in hidden)


def test_help_is_quick_to_import():
    """`m3llm --help` must not load torch."""
    code = "import sys, internvl_chat.cli as cli; cli.build_parser(); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_no_override_of_a_trainer():
    """The training loop is our own: nothing derives from transformers' Trainer."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                assert not any("Trainer" in ast.unparse(base) for base in node.bases), f"{path}: {node.name}"
