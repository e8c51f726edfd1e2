"""Running the training script and the launchers from tests."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from internvl_chat.model.io.weights import open_weights

SOURCE_ROOT = Path(__file__).resolve().parents[1]
LAUNCHERS = SOURCE_ROOT / "internvl_chat/shell/internvl3.0/2nd_finetune"

# Nothing takes so long, however slow or busy the machine is: this guards against tests that hang.
HANG_SECONDS = 1800

# What a small model on a CPU needs beside the recipe.
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
    # Every checkpoint is needed, however slow the disk is.
    "async_save": False,
}

# Two ways to train, and the file that each leaves its weights in.
RECIPES = {
    "full": {},
    "lora": {"use_llm_lora": 4, "freeze_llm": True, "lora_dropout": 0.1},
}
WEIGHTS = {"full": "model.safetensors", "lora": "adapter_model.safetensors"}


def rounding_bound(terms: int, dtype: torch.dtype, magnitude: float) -> float:
    """Bound the difference between two sums of the same `terms` numbers, added in two orders.

    An addition rounds its partial sum by at most eps / 2, here uniformly: a variance of eps^2 / 12. Roundings
    are independent, so that two orders differ with a standard deviation of sqrt(terms / 6) * eps, times the
    partial sums. The bound is 2.4 deviations for partial sums that are all as large as `magnitude`, and more
    than 5 for those of a random walk that ends there. With one term it is the worst case.

    Args:
        terms: additions on the way to a result; those of operations behind one another add up.
        dtype: of the partial sums.
        magnitude: the largest of them; the largest result, unless large terms cancel.
    """
    return terms**0.5 * torch.finfo(dtype).eps * magnitude


def terms_of(model: nn.Module) -> int:
    """Return the additions of a forward pass: the inner dimensions of all matrix products, one after another.

    A backward pass has twice as many more, for the gradients of inputs and of weights.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    return sum(layer.weight[0].numel() for layer in layers)


def assert_within_rounding(
    found: torch.Tensor,
    expected: torch.Tensor,
    terms: int,
    *,
    dtype: torch.dtype = torch.float32,
    magnitude: float | None = None,
    name: str = "",
) -> None:
    """Assert that a result of `dtype` is the expected one but for the order of its sums.

    Args:
        found: the result.
        expected: in the same or in double precision.
        terms: see `rounding_bound`.
        dtype: of the result.
        magnitude: of partial sums [the largest expected value].
        name: what is compared, for the message.
    """
    assert found.dtype == dtype, name
    if magnitude is None:
        magnitude = float(expected.abs().max()) if expected.numel() else 0.0
    bound = rounding_bound(terms, dtype, magnitude)
    torch.testing.assert_close(
        found.double(), expected.double(), atol=bound, rtol=0, msg=lambda text: f"{name}: {text}"
    )


def flags(**values) -> list[str]:
    """Return the command-line tokens of CPU_FLAGS with changes; None drops a flag."""
    merged = {**CPU_FLAGS, **values}
    return [text for name, value in merged.items() if value is not None for text in (f"--{name}", str(value))]


def changed_weights(one: Path, other: Path) -> list[str]:
    """Return the names of the weights that differ between two folders of models, or are in one only."""
    name = next(name for name in WEIGHTS.values() if (one / name).is_file())
    first, second = open_weights(one / name), open_weights(other / name)
    common = first.keys() & second.keys()
    return sorted(first.keys() ^ second.keys()) + [
        name for name in sorted(common) if not torch.equal(first[name](), second[name]())
    ]


def run_training(*argv: str, processes: int = 1) -> subprocess.CompletedProcess:
    """Run the training script in processes of its own."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*start, "-m", "internvl_chat.train.internvl_chat_finetune", *argv]
    environment = {
        **os.environ,
        "PYTHONPATH": str(SOURCE_ROOT),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, env=environment)


def run_launcher(name: str, *argv: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run a launcher from a folder with the given environment."""
    clean = {k: v for k, v in os.environ.items() if k not in ("WANDB_API_KEY", "RANK", "WORLD_SIZE")}
    variables = {**clean, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        ["bash", str(LAUNCHERS / f"M3LLM-fulldata-{name}.sh"), *argv],
        capture_output=True, text=True, timeout=HANG_SECONDS, env=variables, cwd=cwd,
    )  # fmt: skip


def tiny_prompts(shared: Path, engine, each: int) -> list:
    """Return the first questions of the first real records of each task, as prompts."""
    from internvl_chat.data.record_set import RecordSet
    from internvl_chat.data.sources.meta import DatasetSpec
    from internvl_chat.inference.engine import Prompt

    prompts = []
    for file in sorted((shared / "pmc_mi/jsonl").glob("*.jsonl")):
        records = RecordSet(DatasetSpec(file.stem, shared / "pmc_mi/images", file), engine.encoder)
        for index in records.first(each):
            record = records.record(index)
            answered = [message.role for message in record.messages].index("assistant")
            messages = record.messages[:answered]
            shown = sum(message.content.count("<image>") for message in messages if message.role == "user")
            prompts.append(Prompt(messages, records.images(index, record)[:shown]))
    return prompts
