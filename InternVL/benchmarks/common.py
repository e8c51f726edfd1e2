"""Helpers for the benchmark scripts: comma-separated options and JSON reports."""

import argparse
import datetime
import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from internvl_chat.utils.hardware import cpu_bf16_instructions

_LIBRARIES = ("torch", "transformers", "peft", "accelerate")


def parse_names(parser: argparse.ArgumentParser, flag: str, value: str, known: Sequence[str]) -> list[str]:
    """Split comma-separated names; exit with a usage error if a name is unknown.

    Args:
        parser: parser that reports the error.
        flag: name of the flag, for the error message.
        value: comma-separated names, such as `reference,fast`.
        known: valid names.
    """
    names = [name.strip() for name in value.split(",")]
    if unknown := set(names) - set(known):
        parser.error(f"{flag}: unknown: {', '.join(sorted(unknown))}; choose from {','.join(known)}")
    return names


def write_report(file: Path, device: str = "cpu", **results: Any) -> None:
    """Write results as JSON, with the date, the hardware and the library versions.

    Args:
        file: file to write; its folder is created if needed.
        device: device of the measurement, `cpu` or `cuda`.
        results: JSON values; other objects, such as paths, are converted to strings.
    """
    instructions = ", ".join(cpu_bf16_instructions()) or "no bf16 instructions"
    cores = f"{os.cpu_count()} {platform.machine()} CPU cores ({instructions})"
    environment = {
        "date": datetime.date.today().isoformat(),
        "hardware": torch.cuda.get_device_name() if device == "cuda" else cores,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results | environment, indent=2, default=str) + "\n", encoding="utf-8")
