"""What every benchmark writes beside its figures: when, where and with which versions they were measured."""

import datetime
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from internvl_chat.utils.hardware import cpu_bf16_instructions

_LIBRARIES = ("torch", "transformers", "peft", "accelerate")


def write_report(file: Path, device: str = "cpu", **figures: Any) -> None:
    """Write figures as JSON, with date, hardware and versions.

    Args:
        file: to be written; its folder is made.
        device: `cpu` or `cuda`, on which they were measured.
        figures: anything that JSON can hold; paths become text.
    """
    instructions = ", ".join(cpu_bf16_instructions()) or "no bf16 instructions"
    cores = f"{os.cpu_count()} {platform.machine()} CPU cores ({instructions})"
    about = {
        "date": datetime.date.today().isoformat(),
        "hardware": torch.cuda.get_device_name() if device == "cuda" else cores,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(figures | about, indent=2, default=str) + "\n", encoding="utf-8")
