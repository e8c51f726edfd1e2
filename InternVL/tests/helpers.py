"""Test helpers: numeric tolerances, and runs of the training script and the launchers."""

import gc
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from internvl_chat.model.io.weights import open_weights

SOURCE_ROOT = Path(__file__).resolve().parents[1]
LAUNCHERS = SOURCE_ROOT / "internvl_chat/shell/internvl3.0/2nd_finetune"

# Generous: only a test that hangs takes this long.
HANG_SECONDS = 1800

# Flags for a small model on a CPU.
CPU_FLAGS = {
    "use_cpu": True,
    "bf16": False,
    "force_image_size": 56,
    "dynamic_image_size": True,
    "use_thumbnail": True,
    "max_dynamic_patch": 6,
    "freeze_backbone": True,
    "learning_rate": 1e-3,
    "logging_steps": 100,
    "report_to": "none",
    "dataloader_num_workers": 0,
    "disable_tqdm": True,
    "eval_samples": 0,
    # Asynchronous saves may skip checkpoints on slow disks.
    "async_save": False,
}

# Training recipe -> file with its weights.
RECIPES = {
    "full": {},
    "lora": {"use_llm_lora": 4, "freeze_llm": True, "lora_dropout": 0.1},
}
WEIGHTS = {"full": "model.safetensors", "lora": "adapter_model.safetensors"}


needs_bitsandbytes, needs_torchao = (
    pytest.mark.skipif(
        find_spec(name) is None, reason=f"{name} is not installed (pip install 'm3llm[quantization]')"
    )
    for name in ("bitsandbytes", "torchao")
)


def rounding_bound(terms: int, dtype: torch.dtype, magnitude: float) -> float:
    """Return a bound on the difference between two sums of the same numbers in different orders.

    Each addition has a relative rounding error of at most eps / 2; if uniform, its variance is eps^2 / 12.
    The errors are independent, so the difference of two orders has a standard deviation of
    sqrt(terms / 6) * eps * partial sum. The bound is 2.4 standard deviations if all partial sums are as large
    as `magnitude`, and more than 5 for a random walk that ends there. For one term, it is the worst case.

    Args:
        terms: number of additions that contribute to a result, summed over consecutive operations.
        dtype: dtype of the partial sums.
        magnitude: largest partial sum (the largest result, unless large terms cancel).
    """
    return terms**0.5 * torch.finfo(dtype).eps * magnitude


def terms_of(model: nn.Module) -> int:
    """Return the number of additions in a forward pass: the sum of the inner dimensions of all products.

    A backward pass has twice as many, for the gradients of the inputs and the weights.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    return sum(layer.weight[0].numel() for layer in layers)


def assert_within_rounding(
    actual: torch.Tensor,
    expected: torch.Tensor,
    terms: int,
    *,
    dtype: torch.dtype = torch.float32,
    magnitude: float | None = None,
    name: str = "",
) -> None:
    """Assert that two results differ only by the rounding of sums in different orders.

    Args:
        actual: the result.
        expected: expected result, in the same or in double precision.
        terms: see `rounding_bound`.
        dtype: dtype of the result.
        magnitude: magnitude of the partial sums (default: the largest expected value).
        name: name of the value in the error message.
    """
    assert actual.dtype == dtype, name
    if magnitude is None:
        magnitude = float(expected.abs().max()) if expected.numel() else 0.0
    bound = rounding_bound(terms, dtype, magnitude)
    torch.testing.assert_close(
        actual.double(), expected.double(), atol=bound, rtol=0, msg=lambda text: f"{name}: {text}"
    )


def flags(**values) -> list[str]:
    """Return CPU_FLAGS with changes as command-line arguments; None removes a flag."""
    merged = {**CPU_FLAGS, **values}
    return [text for name, value in merged.items() if value is not None for text in (f"--{name}", str(value))]


def changed_weights(first: Path, second: Path) -> list[str]:
    """Return the names of the weights that differ between two model folders or exist in only one."""
    file = next(name for name in WEIGHTS.values() if (first / name).is_file())
    a, b = open_weights(first / file), open_weights(second / file)
    differing = [name for name in sorted(a.keys() & b.keys()) if not torch.equal(a[name](), b[name]())]
    return sorted(a.keys() ^ b.keys()) + differing


def run_launcher(name: str, *argv: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run a launcher in a working directory with additional environment variables."""
    clean = {k: v for k, v in os.environ.items() if k not in ("WANDB_API_KEY", "RANK", "WORLD_SIZE")}
    variables = {**clean, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        ["bash", str(LAUNCHERS / f"M3LLM-fulldata-{name}.sh"), *argv],
        capture_output=True, text=True, timeout=HANG_SECONDS, env=variables, cwd=cwd,
    )  # fmt: skip


def tiny_prompts(shared: Path, engine, each: int) -> list:
    """Return prompts up to the first answer, for the first published records of each task."""
    from internvl_chat.data.record_set import RecordSet
    from internvl_chat.data.sources.meta import DatasetSpec
    from internvl_chat.inference.engine import Prompt

    prompts = []
    for file in sorted((shared / "pmc_mi/jsonl").glob("*.jsonl")):
        records = RecordSet(DatasetSpec(file.stem, shared / "pmc_mi/images", file), engine.encoder)
        for index in records.first(each):
            record = records.record(index)
            first_answer = [message.role for message in record.messages].index("assistant")
            messages = record.messages[:first_answer]
            questions = [message.content for message in messages if message.role == "user"]
            num_images = sum(question.count("<image>") for question in questions)
            prompts.append(Prompt(messages, records.images(index, record)[:num_images]))
    return prompts


def tensor_bytes() -> int:
    """Return the number of bytes of all tensors in use, without those on the meta device."""
    gc.collect()
    storages = [x.untyped_storage() for x in gc.get_objects() if isinstance(x, torch.Tensor)]
    return sum({s.data_ptr(): s.nbytes() for s in storages if s.device.type != "meta"}.values())
