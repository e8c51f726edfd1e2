"""`m3llm doctor`: whether a machine can train, and what to do about each problem."""

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from internvl_chat.commands.machine import diagnose
from internvl_chat.commands.output import emit, print_table, say
from internvl_chat.utils.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `doctor`."""
    parser.add_argument(
        "--folder", type=Path, default=Path(), help="measure the disk of this folder [the current one]"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Report on this machine; returns 1 if something prevents training."""
    if not args.folder.is_dir():
        raise UsageError(f"--folder {args.folder}: no such folder")
    diagnosis = diagnose(args.folder)
    problems = [asdict(problem) for problem in diagnosis.problems]
    if args.json:
        emit(diagnosis.facts | {"problems": problems, "ready": diagnosis.ready})
    else:
        print_table(("what", "found"), list(_rows(diagnosis.facts)))
        say()
        for problem in diagnosis.problems:
            say(f"{problem.severity.upper()}: {problem.what}: {problem.advice}")
        say("training can start here" if diagnosis.ready else "training cannot start here: see the errors")
    return 0 if diagnosis.ready else 1


def _rows(facts: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the facts as names and values for people."""
    for name, value in facts.items():
        label = f"{prefix} {name}".strip().replace("_", " ")
        if isinstance(value, dict) and name != "installed":
            yield from _rows(value, label)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            yield from ((f"{label} {number}", _line(one)) for number, one in enumerate(value))
        else:
            yield label, _line(value)


def _line(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {one}".replace("_", " ") for key, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
