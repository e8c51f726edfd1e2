"""Inspections of a machine: what it has for training, and the problems among it."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from internvl_chat.commands.output import progress
from internvl_chat.utils import hardware
from internvl_chat.utils.paths import REPOSITORY

_SOURCE_ROOT = Path(__file__).resolve().parents[2]

_OLDEST_PYTHON = (3, 11)
# Of InternVL3-8B in full training: 16 GB model, 91.7 GB optimizer state.
_FULL_CHECKPOINT = 107.6e9
_LORA_CHECKPOINT = 0.6e9
_MODEL = 16e9
_TEST_FILE = 256 * 2**20
_SLOW_DISK = 200e6
_SMALL_SHARED_MEMORY = 1e9
# What training does without; all other requirements must be installed.
_OPTIONAL = {
    "deepspeed": "--deepspeed",
    "matplotlib": "the plot of the loss",
    "scipy": "m3llm eval",
    "sentencepiece": "tokenizers that have only a tokenizer.model",
    "timm": "--drop_path_rate",
    "torchvision": "the image processors of exported models",
    "wandb": "--report_to wandb",
}
# Not required, but used where they are installed.
_EXTRAS = ("flash-attn", "liger-kernel", "triton")
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "COMET_API_KEY", "MLFLOW_TRACKING_TOKEN")


@dataclass(frozen=True)
class Problem:
    """Something to do about a machine.

    Attributes:
        what: what was found.
        advice: what to do about it.
        severity: `error` prevents training, `warning` does not.
    """

    what: str
    advice: str
    severity: str = "warning"


@dataclass
class Diagnosis:
    """Facts about a machine by subject, and the problems among them."""

    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def warn(self, what: str, advice: str) -> None:
        """Add a problem that does not prevent training."""
        self.problems.append(Problem(what, advice))

    def fail(self, what: str, advice: str) -> None:
        """Add a problem that prevents training."""
        self.problems.append(Problem(what, advice, "error"))

    @property
    def ready(self) -> bool:
        """Whether training can start."""
        return all(problem.severity != "error" for problem in self.problems)


def diagnose(folder: Path) -> Diagnosis:
    """Inspect this machine; one inspection that fails does not end the others."""
    diagnosis = Diagnosis()
    inspections: dict[str, Callable[[Diagnosis], Any]] = {
        "system": inspect_system,
        "cpu": inspect_cpu,
        "packages": inspect_packages,
        "torch": inspect_torch,
        "gpus": inspect_gpus,
        "attention": inspect_attention,
        "training": inspect_training,
        "disk": functools.partial(inspect_disk, folder),
        "tokens": inspect_tokens,
    }
    for name, inspect in progress(inspections.items(), unit="check"):
        try:
            diagnosis.facts[name] = inspect(diagnosis)
        except Exception as error:
            diagnosis.facts[name] = None
            diagnosis.warn(f"{name} could not be inspected: {type(error).__name__}: {error}", "see the error")
    return diagnosis


def inspect_system(diagnosis: Diagnosis) -> dict[str, Any]:
    """Return the versions of Python and of the system."""
    if sys.version_info < _OLDEST_PYTHON:
        diagnosis.fail(f"Python {platform.python_version()}", "install Python 3.11 or newer")
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "os": platform.platform(),
    }


def inspect_cpu(diagnosis: Diagnosis) -> dict[str, Any]:
    """Return cores, instructions and memory of the host."""
    free, shared = hardware.available_host_memory(), Path("/dev/shm")
    size = shutil.disk_usage(shared).total if shared.is_dir() else None
    if free < _MODEL:
        diagnosis.warn(
            f"{_gb(free)} of host memory are available",
            f"InternVL3-8B needs {_gb(_MODEL)} while it is loaded: raise the memory limit",
        )
    if size is not None and size < _SMALL_SHARED_MEMORY:
        diagnosis.warn(
            f"/dev/shm has {_gb(size)}",
            "dataloader workers and NCCL need more: start the container with --shm-size=8g or --ipc=host",
        )
    return {
        "machine": platform.machine(),
        "cores": hardware.cpu_cores(),
        "bf16_instructions": list(hardware.cpu_bf16_instructions()),
        "available_gb": _in_gb(free),
        "shared_memory_gb": _in_gb(size),
    }


def inspect_packages(diagnosis: Diagnosis) -> dict[str, Any]:
    """Return the versions of the packages, and the supported ranges."""
    from packaging.requirements import Requirement

    installed: dict[str, str | None] = {}
    supported = [Requirement(line) for line in _requirements()]
    for requirement in supported:
        name = requirement.name
        version = installed[name] = _version(name)
        if version is None and name in _OPTIONAL:
            diagnosis.warn(f"{name} is not installed", f"pip install '{requirement}' for {_OPTIONAL[name]}")
        elif version is None:
            diagnosis.fail(f"{name} is not installed", f"pip install '{requirement}'")
        elif not requirement.specifier.contains(version, prereleases=True):
            diagnosis.warn(
                f"{name} {version} is not supported ({requirement.specifier})",
                f"pip install --upgrade '{requirement}'",
            )
    installed |= {name: _version(name) for name in _EXTRAS}
    return {
        "installed": {name: version or "missing" for name, version in installed.items()},
        "supported": list(map(str, supported)),
    }


def inspect_torch(diagnosis: Diagnosis) -> dict[str, Any]:
    """Return what torch was built for, and what it runs on."""
    import torch

    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    has_nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": cudnn,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def inspect_gpus(diagnosis: Diagnosis) -> list[dict[str, Any]]:
    """Return the GPUs, each after a matrix product on it."""
    import torch

    drivers = _drivers()
    if not torch.cuda.is_available():
        if drivers:
            diagnosis.fail(
                f"torch {torch.__version__} finds no GPU, but the driver ({drivers[0]}) does",
                "check CUDA_VISIBLE_DEVICES, and install a torch built for this driver's CUDA",
            )
        else:
            emulated = "" if hardware.cpu_bf16_instructions() else ", in float32 (it emulates bf16)"
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
            diagnosis.fail(f"GPU {index} ({properties.name}) does not work: {error}", "see nvidia-smi")
            continue
        if not works:
            diagnosis.fail(f"GPU {index} ({properties.name}) computes wrong products", "have it replaced")
        if (properties.major, properties.minor) < (8, 0):
            diagnosis.warn(
                f"GPU {index} has compute capability {properties.major}.{properties.minor}",
                "bf16 and the flash kernels need 8.0 or more: expect slow training",
            )
        if free < 0.9 * total:
            diagnosis.warn(
                f"GPU {index}: {_gb(total - free)} are in use", "end the other processes (nvidia-smi)"
            )
        if total < 2 * _MODEL:
            diagnosis.warn(
                f"GPU {index} has {_gb(total)}", f"LoRA needs about {_gb(2 * _MODEL)}: use --parallel fsdp"
            )
        gpus.append(
            {
                "name": properties.name,
                "memory_gb": _in_gb(total),
                "free_gb": _in_gb(free),
                "capability": f"{properties.major}.{properties.minor}",
                "driver": drivers[min(index, len(drivers) - 1)] if drivers else None,
            }
        )
    return gpus


def inspect_attention(diagnosis: Diagnosis) -> dict[str, Any]:
    """Return the attention kernels, each after a call, and the one that training chooses."""
    import torch

    from internvl_chat.model.attention import resolve_attention

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    flash_attn = _version("flash-attn")
    if flash_attn:
        try:
            importlib.import_module("flash_attn")
        except Exception as error:
            diagnosis.fail(
                f"flash-attn {flash_attn} cannot be imported: {error}",
                "it was built for another torch: reinstall it, or uninstall it (torch has a flash kernel)",
            )
    if device.type == "cuda" and not _can_compile():
        diagnosis.warn(
            "no C compiler or no Python headers",
            "torch.compile and the one-pass optimizer step need them: apt install gcc python3-dev",
        )
    return {
        "flash_attn": flash_attn,
        "torch_varlen": _varlen_works(device),
        "sdpa_backends": _sdpa_backends(device),
        "auto": resolve_attention("auto", device),
    }


def inspect_training(diagnosis: Diagnosis) -> str:
    """Import the training script in a process of its own, as a launcher does."""
    paths = [str(_SOURCE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    result = subprocess.run(
        [sys.executable, "-c", "import internvl_chat.train.internvl_chat_finetune"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    if result.returncode == 0:
        return "the training script can be imported"
    reason = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
    diagnosis.fail(f"the training script cannot be imported: {reason}", "pip install -r requirements.txt")
    return reason


def inspect_disk(folder: Path, diagnosis: Diagnosis) -> dict[str, Any]:
    """Return free space and speed of the disk of a folder."""
    free = shutil.disk_usage(folder).free
    try:
        written, read = _disk_speed(folder)
    except OSError as error:
        diagnosis.fail(
            f"{folder.resolve()} cannot be written to: {error.strerror} ({_gb(free)} free)",
            "free some space, or set OUTPUT_DIR to another disk",
        )
        return {"folder": str(folder.resolve()), "free_gb": _in_gb(free)}
    if free < 2 * _LORA_CHECKPOINT:
        diagnosis.warn(
            f"{_gb(free)} are free in {folder.resolve()}",
            f"a LoRA checkpoint has about {_gb(_LORA_CHECKPOINT)}, and two are there while one is replaced: "
            "set OUTPUT_DIR to another disk",
        )
    elif free < 2 * _FULL_CHECKPOINT:
        diagnosis.warn(
            f"{_gb(free)} are free in {folder.resolve()}",
            f"a checkpoint of full training has {_gb(_FULL_CHECKPOINT)}, and two are there while one is "
            "replaced: set OUTPUT_DIR to another disk, or train with --save_only_model True",
        )
    if written < _SLOW_DISK:
        minutes = _FULL_CHECKPOINT / written / 60
        diagnosis.warn(
            f"{folder.resolve()} is written at {written / 1e6:.0f} MB/s",
            f"a checkpoint of full training takes {minutes:.0f} minutes: set OUTPUT_DIR to a faster disk, or "
            "raise --save_steps",
        )
    return {
        "folder": str(folder.resolve()),
        "free_gb": _in_gb(free),
        "write_mb_per_second": round(written / 1e6),
        "read_mb_per_second": round(read / 1e6),
    }


def inspect_tokens(diagnosis: Diagnosis) -> list[str]:
    """Return the names of the tokens in the environment, never a value."""
    found = [name for name in _TOKENS if os.environ.get(name)]
    if "WANDB_API_KEY" in found and _version("wandb") is None:
        diagnosis.warn("WANDB_API_KEY is set, but wandb is missing", "pip install wandb, or REPORT_TO=none")
    return found


def _requirements() -> list[str]:
    """Return the requirements of the repository, or of the installed package."""
    file = REPOSITORY / "requirements.txt"
    if file.is_file():
        lines = (line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
        return [line for line in lines if line]
    return [line for line in metadata.requires("m3llm") or () if "extra ==" not in line]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _drivers() -> list[str]:
    """Return the driver version of each GPU that nvidia-smi finds."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()
    return []


def _can_compile() -> bool:
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return headers.is_file() and any(map(shutil.which, ("cc", "gcc", "clang")))


def _sdpa_backends(device: Any) -> list[str]:
    """Return the backends with which torch's attention runs a small bf16 call."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    query = torch.randn(1, 4, 64, 64, device=device, dtype=torch.bfloat16)
    found = []
    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        # A backend that cannot run warns why, and raises.
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.suppress(RuntimeError),
            sdpa_kernel(getattr(SDPBackend, name)),
        ):
            torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
            found.append(name.lower().removesuffix("_attention"))
    return found


def _varlen_works(device: Any) -> bool:
    """Return whether torch's variable-length flash kernel runs a small bf16 call."""
    import torch

    if device.type != "cuda":
        return False
    try:
        from torch.nn.attention.varlen import varlen_attn

        query = torch.randn(64, 4, 64, device=device, dtype=torch.bfloat16)
        bounds = torch.tensor([0, 24, 64], device=device, dtype=torch.int32)
        varlen_attn(query, query, query, bounds, bounds, 40, 40)
        torch.cuda.synchronize()
    except (ImportError, RuntimeError):
        return False
    return True


def _disk_speed(folder: Path) -> tuple[float, float]:
    """Return the bytes per second of writing a file to the disk and of reading it back."""
    block = os.urandom(2**20) * 16
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".m3llm-doctor-") as file:
        began = time.perf_counter()
        for _ in range(_TEST_FILE // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter() - began
        if hasattr(os, "posix_fadvise"):  # read from the disk, not from the page cache
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        began = time.perf_counter()
        while file.read(len(block)):
            pass
        read = time.perf_counter() - began
    return _TEST_FILE / written, _TEST_FILE / read


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def _in_gb(size: float | None) -> float | None:
    return None if size is None else round(size / 1e9, 1)
