"""Inspections of the CPU, host memory, GPUs and disk."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from internvl_chat.utils import hardware
from internvl_chat.utils.doctor.diagnosis import Diagnosis

# Sizes for InternVL3-8B. A full-training checkpoint has 16 GB of weights and 91.7 GB of optimizer state.
_MODEL_BYTES = 16e9
_FULL_CHECKPOINT_BYTES = 107.6e9
_LORA_CHECKPOINT_BYTES = 0.6e9
_TEST_FILE_BYTES = 256 * 2**20
_MIN_BYTES_PER_SECOND = 200e6
_MIN_SHARED_MEMORY_BYTES = 1e9


def inspect_cpu(diagnosis: Diagnosis) -> dict[str, Any]:
    """Return the CPU cores, bf16 instruction sets and available host memory; warn if memory is low."""
    free, shared = hardware.available_host_memory(), Path("/dev/shm")
    shared_bytes = shutil.disk_usage(shared).total if shared.is_dir() else None
    if free < _MODEL_BYTES:
        diagnosis.warn(
            f"only {_format_gb(free)} of host memory is available",
            f"loading InternVL3-8B needs {_format_gb(_MODEL_BYTES)}: raise the memory limit",
        )
    if shared_bytes is not None and shared_bytes < _MIN_SHARED_MEMORY_BYTES:
        diagnosis.warn(
            f"/dev/shm has only {_format_gb(shared_bytes)}",
            "dataloader workers and NCCL need more: start the container with --shm-size=8g or --ipc=host",
        )
    return {
        "machine": platform.machine(),
        "cores": hardware.cpu_cores(),
        "bf16_instructions": list(hardware.cpu_bf16_instructions()),
        "available_gb": _gb(free),
        "shared_memory_gb": None if shared_bytes is None else _gb(shared_bytes),
    }


def inspect_gpus(diagnosis: Diagnosis) -> list[dict[str, Any]]:
    """Return the properties of all working GPUs; report GPUs that are broken, slow, busy or small."""
    import torch

    drivers = _drivers()
    if not torch.cuda.is_available():
        if drivers:
            diagnosis.fail(
                f"torch {torch.__version__} finds no GPU, but the driver ({drivers[0]}) does",
                "check CUDA_VISIBLE_DEVICES, or install a torch build that supports this driver",
            )
        else:
            emulated = "" if hardware.cpu_bf16_instructions() else ", in float32 (bf16 is emulated)"
            diagnosis.warn("no GPU", f"only small models can be trained on a CPU (GPUS=0){emulated}")
        return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        try:
            matrix = torch.ones(64, 64, device=f"cuda:{index}", dtype=torch.bfloat16)
            works = bool((matrix @ matrix == 64).all())
            free, total = torch.cuda.mem_get_info(index)
        except RuntimeError as error:
            diagnosis.fail(f"GPU {index} ({properties.name}) does not work: {error}", "run nvidia-smi")
            continue
        if not works:
            diagnosis.fail(
                f"GPU {index} ({properties.name}) computes wrong matrix products", "replace the GPU"
            )
        capability = f"{properties.major}.{properties.minor}"
        if (properties.major, properties.minor) < (8, 0):
            diagnosis.warn(
                f"GPU {index} has compute capability {capability}",
                "bf16 and the flash kernels need 8.0 or higher: expect slow training",
            )
        if free < 0.9 * total:
            diagnosis.warn(
                f"GPU {index}: {_format_gb(total - free)} of memory is in use",
                "stop the other processes (see nvidia-smi)",
            )
        if total < 2 * _MODEL_BYTES:
            diagnosis.warn(
                f"GPU {index} has only {_format_gb(total)} of memory",
                f"LoRA needs about {_format_gb(2 * _MODEL_BYTES)}: use --parallel fsdp",
            )
        gpus.append(
            {
                "name": properties.name,
                "memory_gb": _gb(total),
                "free_gb": _gb(free),
                "capability": capability,
                "driver": drivers[min(index, len(drivers) - 1)] if drivers else None,
            }
        )
    return gpus


def inspect_disk(folder: Path, diagnosis: Diagnosis) -> dict[str, Any]:
    """Return the free space and speed of the disk that contains a folder; warn if either is too low."""
    free, path = shutil.disk_usage(folder).free, str(folder.resolve())
    try:
        write_speed, read_speed = _disk_speed(folder)
    except OSError as error:
        diagnosis.fail(
            f"cannot write to {path}: {error.strerror} ({_format_gb(free)} free)",
            "free some space, or set OUTPUT_DIR to another disk",
        )
        return {"folder": path, "free_gb": _gb(free)}
    # The previous checkpoint is deleted only after the next one is complete, so there must be space for two.
    if free < 2 * _LORA_CHECKPOINT_BYTES:
        diagnosis.warn(
            f"only {_format_gb(free)} free in {path}",
            f"a LoRA checkpoint takes about {_format_gb(_LORA_CHECKPOINT_BYTES)}, and two must fit: set "
            "OUTPUT_DIR to another disk",
        )
    elif free < 2 * _FULL_CHECKPOINT_BYTES:
        diagnosis.warn(
            f"only {_format_gb(free)} free in {path}",
            f"a full-training checkpoint takes {_format_gb(_FULL_CHECKPOINT_BYTES)}, and two must fit: set "
            "OUTPUT_DIR to another disk, or train with --save_only_model True",
        )
    if write_speed < _MIN_BYTES_PER_SECOND:
        minutes = _FULL_CHECKPOINT_BYTES / write_speed / 60
        diagnosis.warn(
            f"the disk of {path} writes only {write_speed / 1e6:.0f} MB/s",
            f"writing a full-training checkpoint takes {minutes:.0f} minutes: set OUTPUT_DIR to a "
            "faster disk, or raise --save_steps",
        )
    return {
        "folder": path,
        "free_gb": _gb(free),
        "write_mb_per_second": round(write_speed / 1e6),
        "read_mb_per_second": round(read_speed / 1e6),
    }


def _drivers() -> list[str]:
    """Return the driver version of each GPU that nvidia-smi lists."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()
    return []


def _disk_speed(folder: Path) -> tuple[float, float]:
    """Measure the write and read speed in a folder with a temporary file, in bytes per second."""
    block = os.urandom(2**20) * 16
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".m3llm-doctor-") as file:
        start = time.perf_counter()
        for _ in range(_TEST_FILE_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        write_seconds = time.perf_counter() - start
        if hasattr(os, "posix_fadvise"):  # read from the disk, not from the page cache
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        start = time.perf_counter()
        while file.read(len(block)):
            pass
        read_seconds = time.perf_counter() - start
    return _TEST_FILE_BYTES / write_seconds, _TEST_FILE_BYTES / read_seconds


def _format_gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def _gb(size: float) -> float:
    return round(size / 1e9, 1)
