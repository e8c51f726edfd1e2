"""`m3llm doctor`: check whether this machine can train, and suggest a fix for each problem."""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from internvl_chat.commands.output import echo, print_json, print_table, progress
from internvl_chat.utils.doctor import hardware, software
from internvl_chat.utils.doctor.diagnosis import Diagnosis
from internvl_chat.utils.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `doctor`."""
    parser.add_argument("--folder", type=Path, default=Path(),
        help="folder whose disk space is checked (default: the current folder)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Inspect this machine; return 1 if a problem prevents training."""
    if not args.folder.is_dir():
        raise UsageError(f"--folder {args.folder}: no such folder")
    diagnosis = diagnose(args.folder)
    if args.json:
        problems = [asdict(problem) for problem in diagnosis.problems]
        print_json(diagnosis.facts | {"problems": problems, "ready": diagnosis.ready})
    else:
        print_table(("item", "value"), list(_rows(diagnosis.facts)))
        echo()
        for problem in diagnosis.problems:
            echo(f"{problem.severity.upper()}: {problem.what}: {problem.advice}")
        echo("ready to train" if diagnosis.ready else "not ready to train: see the errors above")
    return 0 if diagnosis.ready else 1


def diagnose(folder: Path) -> Diagnosis:
    """Run all inspections and return the facts and problems that they found.

    Args:
        folder: folder whose disk is inspected.
    """
    inspections: dict[str, Callable[[Diagnosis], Any]] = {
        "system": software.inspect_system,
        "cpu": hardware.inspect_cpu,
        "packages": software.inspect_packages,
        "torch": software.inspect_torch,
        "gpus": hardware.inspect_gpus,
        "attention": _inspect_attention,
        "training": software.inspect_training,
        "disk": partial(hardware.inspect_disk, folder),
        "tokens": software.inspect_tokens,
    }
    diagnosis = Diagnosis()
    for name, inspect in progress(inspections.items(), unit="check"):
        diagnosis.run(name, inspect)
    return diagnosis


def _inspect_attention(diagnosis: Diagnosis) -> dict[str, Any]:
    """Return the attention kernels that work, and the one that `--attn auto` selects."""
    import torch

    from internvl_chat.model.attention import resolve_attention

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return software.inspect_attention(device, diagnosis) | {"auto": resolve_attention("auto", device)}


def _rows(facts: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the facts as table rows; nested keys are joined with spaces."""
    for name, value in facts.items():
        label = f"{prefix} {name}".strip().replace("_", " ")
        if isinstance(value, dict) and name != "installed":
            yield from _rows(value, label)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            yield from ((f"{label} {number}", _format(entry)) for number, entry in enumerate(value))
        else:
            yield label, _format(value)


def _format(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {entry}".replace("_", " ") for key, entry in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
