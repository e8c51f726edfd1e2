"""Package structure: layers without upward imports or cycles, small folders, mirrored tests."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "internvl_chat"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")

# The layers of the package and of two of its subpackages, lowest first. A module imports only from its own
# subpackage and from lower layers, not from others in the same layer. The longest matching name counts.
LAYERS = {
    "": (
        "constants",
        "utils",
        "metrics data model",
        "inference",
        "convert",
        "train eval",
        "api",
        "commands",
        "cli",
    ),
    "data": (
        "sources.problems",
        "storage",
        "sources",
        "encode",
        "record_set",
        "index shard_writer",
        "dataset",
        "batching audit",
        "synthetic browse",
    ),
    "model": (
        "configuration loss projector kernels.cross_entropy",
        "kernels.supervised_head",
        "kernels.cpu",
        "attention",
        "modeling_intern_vit",
        "modeling_internvl_chat",
        "kernels",
        "lora",
        "flops memory",
        "io",
        "assemble tiny",
    ),
}  # fmt: skip
# Modules built on the libraries of the `ui` extra; other modules import them inside functions.
WEB_APPLICATIONS = (
    "commands.inference.line_editor",
    "data.browse.",
    "inference.responses",
    "inference.serve.",
    "inference.web.",
    "train.report.",
    "utils.web",
)
MAX_MODULES = 14
MIN_LINES = 30
# Short modules with a single importer that are kept, and the reason.
SMALL_MODULES: dict[str, str] = {}
# Modules and packages without a separate test file, and the tests that cover them.
TESTED_BY = {
    # Constants, used by all tests.
    "constants": "test_architecture.py",
    "utils.paths": "test_architecture.py",
    # Commands, tested through the command line.
    "cli": "integration/test_cli.py",
    "commands": "integration/test_cli.py",
    "utils.doctor": "commands/test_doctor.py",
    "utils.gpus": "model/test_flops.py",
    "train.flags": "train/test_arguments.py",
    "train.config": "train/test_arguments.py",
    "train.refused_flags": "train/test_arguments.py",
    "train.checks": "integration/test_bad_input.py",
    "train.internvl_chat_finetune": "integration/test_launchers.py",
    # Small modules with a common interface, tested together.
    "eval.benchmarks": "eval/test_benchmarks.py",
    "eval.lmms_eval_tasks": "eval/test_lmms_eval_tasks.py",
    "eval.report": "eval/test_report.py",
    "metrics.suite": "eval/test_scoring.py",
    # Parts of a feature that is tested as a whole.
    "convert.export": "integration/test_export.py",
    "convert.model_card": "train/test_model_card.py",
    "convert.parity_runners": "convert/test_parity.py",
    "data.audit.benchmark_files": "data/audit/test_contamination.py",
    "data.audit.duplicates": "data/audit/test_checks.py",
    "data.audit.image_hash": "data/audit/test_contamination.py",
    "data.audit.report": "data/audit/test_checks.py",
    "data.audit.statistics": "data/audit/test_checks.py",
    "data.batching.dataloader": "data/batching/test_collator.py",
    "data.browse.pages": "data/browse/test_app.py",
    "data.browse.rows": "data/browse/test_app.py",
    "data.index.cache": "data/index/test_build.py",
    "data.record_set": "data/test_dataset.py",
    "data.sources.preview": "data/audit/test_gallery.py",
    "data.sources.problems": "data/sources/test_skip_policy.py",
    "data.synthetic.figures": "data/synthetic/test_panels.py",
    "data.synthetic.text_questions": "data/synthetic/test_questions.py",
    "eval.answering": "integration/test_benchmark.py",
    "inference.responses": "inference/serve/test_app.py",
    "inference.tile_features": "inference/test_engine.py",
    "inference.token_losses": "eval/test_losses.py",
    "inference.web.archive": "inference/web/test_app.py",
    "inference.web.schema": "inference/web/test_app.py",
    "model.io.merged_checkpoint": "convert/test_merge.py",
    "model.kernels.cpu.blocked_attention": "model/test_attention.py",
    "train.checkpoint": "train/checkpoint/test_saver.py",
    "utils.hashed_file": "model/io/test_weights.py",
    "train.distributed": "integration/test_processes.py",
    "train.planning": "train/planning/test_estimate.py",
    "train.report": "train/report/test_page.py",
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in FILES}


def imported(path: Path) -> set[str]:
    """Return the modules of this package that a file imports, including imports inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return {name.removeprefix("internvl_chat.") for name in names} & MODULES.keys()


IMPORTS = {name: imported(path) for name, path in MODULES.items()}


def locate(name: str, layers: tuple[str, ...]) -> tuple[int, str]:
    """Return the layer of a module, and its subpackage in this layer."""
    matches = [
        (len(part), layer, part)
        for layer, parts in enumerate(layers)
        for part in parts.split()
        if f"{name}.".startswith(f"{part}.")
    ]
    assert matches, f"{name} is in no layer"
    return max(matches)[1:]


@pytest.mark.parametrize("package", LAYERS)
def test_no_import_runs_upward(package):
    prefix = f"{package}." if package else ""
    for importer, modules in IMPORTS.items():
        for module in modules:
            if not (importer.startswith(prefix) and module.startswith(prefix)):
                continue
            layer, part = locate(importer.removeprefix(prefix), LAYERS[package])
            other_layer, other_part = locate(module.removeprefix(prefix), LAYERS[package])
            assert part == other_part or other_layer < layer, f"{importer} must not import {module}"


def test_no_cycle():
    state: dict[str, str] = {}

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert state.get(module) != "open", f"cycle: {' -> '.join((*trail, module))}"
        if state.get(module) == "done":
            return
        state[module] = "open"
        for name in IMPORTS[module]:
            visit(name, (*trail, module))
        state[module] = "done"

    for module in MODULES:
        visit(module, ())
    assert set(state.values()) == {"done"}


def test_folders_are_small():
    folders = Counter(path.parent for path in FILES if path.name != "__init__.py")
    assert {str(folder): count for folder, count in folders.items() if count > MAX_MODULES} == {}


def test_no_crumbs():
    importers = Counter(name for modules in IMPORTS.values() for name in modules)
    crumbs = {
        name
        for name, path in MODULES.items()
        if path.name != "__init__.py"
        and importers[name] == 1
        and len(path.read_text(encoding="utf-8").splitlines()) < MIN_LINES
    }
    assert crumbs == SMALL_MODULES.keys()


def covered_by(name: str) -> str | None:
    """Return the entry of `TESTED_BY` for a module or one of its packages."""
    return next((key for key in TESTED_BY if f"{name}.".startswith(f"{key}.")), None)


def test_every_module_has_its_mirrored_test():
    unused = set(TESTED_BY)
    for name, path in MODULES.items():
        mirrored = TESTS / path.relative_to(PACKAGE).parent / f"test_{path.name}"
        if path.name == "__init__.py" or mirrored.exists():
            continue
        key = covered_by(name)
        assert key, f"{name} has no {mirrored.relative_to(TESTS)}"
        unused.discard(key)
    assert not unused, "these modules have a separate test file or no longer exist"
    assert all((TESTS / file).is_file() for file in TESTED_BY.values())


def test_package_imports_no_optional_library_by_itself():
    """Modules import optional libraries only inside functions, except the web applications."""
    optional = {"deepspeed", "wandb", "flash_attn", "timm", "matplotlib"}
    optional |= {"nltk", "rouge", "bert_score", "sentence_transformers", "sklearn", "pyarrow"}
    optional |= {"boto3", "fsspec", "s3fs", "tenacity"}
    optional |= {"fastapi", "jinja2", "plotly", "prompt_toolkit", "starlette", "uvicorn"}
    for name, path in MODULES.items():
        if name.startswith(WEB_APPLICATIONS):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                assert not optional & {alias.name.split(".")[0] for alias in node.names}, path
            elif isinstance(node, ast.ImportFrom) and node.module:
                assert node.module.split(".")[0] not in optional, path


def test_every_public_function_and_file_is_documented():
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), f"{path} has no docstring"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node) or _is_private(tree, node), f"{path}: {node.name}"


def _is_private(tree: ast.Module, node: ast.AST) -> bool:
    """Return whether a definition is inside a function or a private class."""
    enclosing = (
        outer
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef)
        or (isinstance(outer, ast.ClassDef) and outer.name.startswith("_"))
    )
    return any(outer is not node and node in ast.walk(outer) for outer in enclosing)


def test_help_is_quick_to_import():
    """`m3llm --help` must not load torch."""
    code = "import sys, internvl_chat.cli as cli; cli.build_parser(); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_no_override_of_a_trainer():
    """The package has its own training loop: no class derives from transformers' Trainer."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                assert not any("Trainer" in ast.unparse(base) for base in node.bases), f"{path}: {node.name}"
