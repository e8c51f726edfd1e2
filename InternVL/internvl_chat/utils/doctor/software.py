"""Inspections of Python, packages, torch, attention kernels, the training script and access tokens."""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import warnings
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl_chat.utils.doctor.diagnosis import Diagnosis
from internvl_chat.utils.paths import REPOSITORY

if TYPE_CHECKING:
    import torch

_SOURCE_ROOT = Path(__file__).resolve().parents[3]
_MIN_PYTHON = (3, 11)
# Requirement that training does not need -> feature that needs it.
_OPTIONAL = {
    "deepspeed": "--deepspeed",
    "matplotlib": "the loss plot",
    "scipy": "m3llm eval, m3llm data check --against",
    "sentencepiece": "tokenizers that have only a tokenizer.model",
    "timm": "--drop_path_rate",
    "torchvision": "the image processors of exported models",
    "wandb": "--report_to wandb",
}
# Packages that are not required, but used if installed.
_EXTRAS = ("flash-attn", "liger-kernel", "triton", "bitsandbytes", "torchao")
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "COMET_API_KEY", "MLFLOW_TRACKING_TOKEN")


def inspect_system(diagnosis: Diagnosis) -> dict[str, Any]:
    """Return the Python version and executable, and the operating system; report a Python that is too old."""
    if sys.version_info < _MIN_PYTHON:
        diagnosis.fail(f"Python {platform.python_version()} is too old", "install Python 3.11 or newer")
    return {"python": platform.python_version(), "executable": sys.executable, "os": platform.platform()}


def inspect_packages(diagnosis: Diagnosis) -> dict[str, Any]:
    """Return the installed and the supported package versions; report missing and unsupported packages."""
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
    """Return the versions of torch, CUDA, cuDNN and NCCL, and the CPU instruction set that torch uses."""
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


def inspect_attention(device: torch.device, diagnosis: Diagnosis) -> dict[str, Any]:
    """Return the attention kernels that work on a device; report broken flash-attn or a missing compiler."""
    flash_attn = _version("flash-attn")
    if flash_attn:
        try:
            importlib.import_module("flash_attn")
        except Exception as error:
            diagnosis.fail(
                f"flash-attn {flash_attn} cannot be imported: {error}",
                "it was built for another torch version: reinstall or uninstall it (torch includes its own)",
            )
    if device.type == "cuda" and not _can_compile():
        diagnosis.warn(
            "no C compiler or no Python headers",
            "torch.compile and the fused optimizer step need them: apt install gcc python3-dev",
        )
    return {
        "flash_attn": flash_attn,
        "torch_varlen": _varlen_works(device),
        "sdpa_backends": _sdpa_backends(device),
    }


def inspect_training(diagnosis: Diagnosis) -> str:
    """Import the training script in a subprocess; return the result as text, and report a failure."""
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


def inspect_tokens(diagnosis: Diagnosis) -> list[str]:
    """Return the names (not the values) of access tokens in the environment.

    Report a token for W&B if the package wandb is missing.
    """
    names = [name for name in _TOKENS if os.environ.get(name)]
    if "WANDB_API_KEY" in names and _version("wandb") is None:
        diagnosis.warn("WANDB_API_KEY is set, but wandb is missing", "pip install wandb, or REPORT_TO=none")
    return names


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


def _can_compile() -> bool:
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return headers.is_file() and any(map(shutil.which, ("cc", "gcc", "clang")))


def _sdpa_backends(device: torch.device) -> list[str]:
    """Return the names of the SDPA backends that can run a small example in bf16."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    query = torch.randn(1, 4, 64, 64, device=device, dtype=torch.bfloat16)
    backends = []
    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        # An unsupported backend emits warnings and then raises.
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.suppress(RuntimeError),
            sdpa_kernel(getattr(SDPBackend, name)),
        ):
            torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
            backends.append(name.lower().removesuffix("_attention"))
    return backends


def _varlen_works(device: torch.device) -> bool:
    """Return whether torch's variable-length flash kernel can run a small example in bf16."""
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
