"""Rows of `sessions.jsonl`: when a run was started or resumed, and with which software, hardware and data."""

import contextlib
import platform
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from internvl_chat import __version__
from internvl_chat.data.dataset import TrainingData
from internvl_chat.train.config import RunConfig
from internvl_chat.utils import hardware
from internvl_chat.utils.doctor.diagnosis import Diagnosis
from internvl_chat.utils.doctor.software import inspect_packages
from internvl_chat.utils.paths import REPOSITORY

_GIT_SECONDS = 10


def session_row(
    run: RunConfig,
    *,
    step: int,
    total_steps: int,
    description: str,
    layout: str,
    parameters: tuple[int, int],
    data: TrainingData,
    eval_data: TrainingData | None,
) -> dict[str, Any]:
    """Return the row of a session.

    Args:
        run: configuration of the run, on rank 0.
        step: number of steps done before this session.
        total_steps: number of steps of the run.
        description: model and recipe in one line.
        layout: `Strategy.name`.
        parameters: total and trainable parameter counts.
        data: training data.
        eval_data: validation data; None without validation.
    """
    return {
        "step": step,
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "total_steps": total_steps,
        "description": description,
        "parameters": parameters[0],
        "trained_parameters": parameters[1],
        "git": git_commit(),
        "versions": versions(),
        "hardware": {
            "ranks": run.world_size,
            "layout": layout,
            **_device(run.device),
            "cpu_cores": hardware.cpu_cores(),
            "host_memory_gb": round(hardware.available_host_memory() / 1e9, 1),
        },
        "data": dataset_rows(data),
        "validation_data": [] if eval_data is None else dataset_rows(eval_data),
    }


def dataset_rows(data: TrainingData) -> list[dict[str, Any]]:
    """Return the size of each dataset.

    `records_per_epoch` counts repetitions; tokens and tiles are those of these records.
    """
    rows = []
    for number, (records, size) in enumerate(zip(data.sets, data.sizes, strict=True)):
        row = {
            "dataset": records.spec.name,
            "file": str(records.spec.annotation),
            "records": len(records),
            "excluded": sum(record.dataset == records.spec.name for record in data.excluded),
            "records_per_epoch": size,
            "max_tiles": records.encoder.preprocessing.max_dynamic_patch,
        }
        if data.lengths is not None:
            used = data.indices(number)
            lengths = data.lengths[number].select(used)
            repeats = size // max(len(used), 1)
            row |= {
                "tokens": int(lengths.tokens.sum()) * repeats,
                "supervised_tokens": int(lengths.supervised.sum()) * repeats,
                "tiles": int(lengths.tiles.sum()) * repeats,
                "longest": int(lengths.tokens.max(initial=0)),
                "with_fewer_tiles": int((lengths.tiles_lost > 0).sum()),
                "truncated": int((lengths.tokens_truncated > 0).sum()),
            }
        rows.append(row)
    return rows


def versions() -> dict[str, str]:
    """Return the versions of Python, this package, its installed requirements and CUDA."""
    diagnosis = Diagnosis()
    diagnosis.run("packages", inspect_packages)
    installed = (diagnosis.facts["packages"] or {}).get("installed", {})
    found = {"python": platform.python_version(), "m3llm": __version__}
    found |= {name: version for name, version in installed.items() if version != "missing"}
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def git_commit(folder: Path = REPOSITORY) -> str | None:
    """Return the commit of this code, with `-dirty` if files were changed; None outside a repository."""
    if not (folder / ".git").exists() or not Path(__file__).is_relative_to(folder):
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_GIT_SECONDS)
        return result.stdout.strip()
    return None


def _device(device: torch.device) -> dict[str, Any]:
    """Return the name and, for a GPU, the memory of a device."""
    if device.type != "cuda":
        return {"device": hardware.cpu_name()}
    properties = torch.cuda.get_device_properties(device)
    return {"device": properties.name, "device_memory_gb": round(properties.total_memory / 1e9, 1)}
