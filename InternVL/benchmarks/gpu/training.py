"""Items that train models with random weights: throughput, compiled blocks, checkpoints, memory, FSDP2."""

import dataclasses
import gc
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import train_throughput
from benchmarks.gpu.check import Check, Skipped
from benchmarks.jobs import Job, Result, peak_memory, run_in_subprocess
from benchmarks.presets.fast import PLAN, make_loop, read_metrics
from benchmarks.presets.recipes import RECIPES
from benchmarks.shapes import SHAPES, default_dtype
from benchmarks.workload import Workload, prepare_workload
from internvl_chat.utils import distributed

SCRIPT = Path(train_throughput.__file__).resolve()
_MODELS = {"small": "smoke", "8b": "internvl3-8b"}
# Models for the items that do not need a full-size model.
_SMALLER_MODELS = {"small": "smoke", "8b": "mid"}
_STEPS = {"small": ["--steps", "1", "--warmup", "1"], "8b": []}
_GB = 1e9
# Memory that the plan does not include: cuBLAS workspaces (bytes) and allocator fragmentation (fraction).
_UNPLANNED_BYTES, _UNPLANNED_FRACTION = 0.3 * _GB, 0.1
# Relative tolerance of the loss of a step: the epsilon of bf16.
_LOSS_TOLERANCE = 2**-7


def train_lora(check: Check) -> None:
    """Measure the throughput of LoRA training and compare it with the reference."""
    _train(check, "lora", [()])


def train_full(check: Check) -> None:
    """Measure full training in the highest precision that fits in memory; compare it with the reference."""
    precisions = [("--weight_precision", name) for name in ("master", "stochastic", "bf16")]
    _train(check, "full", precisions if check.on_gpu else [()])


def _train(check: Check, recipe: str, choices: list[tuple[str, ...]]) -> None:
    """Measure the `fast` preset with the first of `choices` that fits in memory, then the reference."""
    fast, reference = _jobs(check, recipe, ["fast", "reference"])
    errors = []
    for number, flags in enumerate(choices):
        # The first error message lists the flags that would fit; skip all others.
        if errors and f"{' '.join(flags)} (" not in errors[0]:
            continue
        try:
            row = _measure(check, dataclasses.replace(fast, flags=flags), number)
            break
        except RuntimeError as error:
            if "does not fit" not in str(error):
                raise
            is_planned = "does not fit in" in str(error)
            check.expect(is_planned, f"{' '.join((recipe, *flags))}: the plan fits, but the dry run does not")
            errors.append(str(error)[-2000:])
            check.add(refused=errors)
    else:
        raise Skipped(f"{recipe} training does not fit: {errors[0]}")
    check.add(fast=row, flags=" ".join(flags))
    check.summary = _describe(row, " ".join(flags))
    if check.on_gpu:
        _compare_memory(check, recipe, row["plan"]["total"], row["peak_memory_gb"] * _GB)
    try:
        reference_row = _measure(check, reference, len(choices))
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        check.add(reference="out of memory")
        check.summary += "; the reference is out of memory"
        return
    ratio = row["records_per_second"] / reference_row["records_per_second"]
    check.add(reference=reference_row, ratio=ratio)
    check.summary += f"; reference {_describe(reference_row)}; {ratio:.2f} times the reference"
    results = [Result(**r.pop("result")) for r in (row, reference_row)]
    train_throughput.check_same_work(dict(zip(("fast", "reference"), results, strict=True)))


def compiled_blocks(check: Check) -> None:
    """Compare LoRA training with compiled and with eager blocks: first loss and speed."""
    if not check.on_gpu:
        raise Skipped("on a CPU, compilation takes minutes without a speedup")
    (job,) = _jobs(check, "lora", ["fast"])
    row = _measure(check, dataclasses.replace(job, flags=("--torch_compile", "True")), 0)
    check.add(compiled=row)
    check.summary = _describe(row, "compiled")
    eager = ((check.result_of("train-lora") or {}).get("figures") or {}).get("fast")
    eager = eager or _measure(check, job, 1)
    check.add(eager=eager)
    losses = [r["first_loss"] for r in (row, eager)]
    check.compare("first loss", abs(losses[0] / losses[1] - 1), train_throughput.LOSS_TOLERANCE)
    check.summary += f"; {row['records_per_second'] / eager['records_per_second']:.2f} times the eager speed"


def checkpoint(check: Check) -> None:
    """Measure the size of a LoRA checkpoint and the duration of the step after an asynchronous save."""
    file = check.folder / "rows.json"
    steps = {"small": ["--steps", "4", "--every", "2"], "8b": ["--steps", "6", "--every", "3"]}[check.size]
    subprocess.run(
        [sys.executable, str(SCRIPT.with_name("checkpoint_overhead.py")), "--recipe", "lora", "--model",
         _MODELS[check.size], "--device", check.device, "--modes", "background", "--warmup", "1", *steps,
         "--folder", str(check.folder), "--json", str(file)],
        check=True,
    )  # fmt: skip
    (row,) = json.loads(file.read_text(encoding="utf-8"))["rows"]
    check.add(**row)
    # On a CPU, the save takes longer than a step and competes with it for cores.
    check.expect(
        not check.on_gpu or row["ratio"] <= 1.5,
        f"the step after a save takes {row['ratio']:.2f} times the median",
    )
    check.summary = (
        f"{row['checkpoint_gb']:.2f} GB; the step after a save takes {row['ratio']:.2f} times the median of "
        f"{row['median_seconds']:.2f} s"
    )


def memory(check: Check) -> None:
    """Compare the peak memory with the planned memory, for both recipes."""
    ratios = []
    for recipe in ("lora", "full"):
        for checkpointed in ("False", "True") if check.on_gpu else ("auto",):
            name = f"{recipe}, --grad_checkpoint {checkpointed}"
            rows = _train_in_process(check, name, recipe, ("--grad_checkpoint", checkpointed))
            plan, used = rows[0]["plan"], peak_memory(torch.device(check.device))
            check.add(**{name: {"planned_gb": plan["total"] / _GB, "used_gb": used / _GB, "plan": plan}})
            if check.on_gpu:  # on a CPU, libraries use most of the memory
                _compare_memory(check, name, plan["total"], used)
                ratios.append(f"{used / plan['total']:.2f}")
    check.summary = (
        f"used memory / planned memory: {', '.join(ratios)}" if ratios else "not compared on a CPU"
    )


def fsdp(check: Check) -> None:
    """Compare the losses of FSDP2 on one rank with those of a run without FSDP2."""
    _compare_layouts(check, "full", "--parallel", "fsdp")


def cpu_offload(check: Check) -> None:
    """Compare the losses of LoRA training with and without CPU offload."""
    _compare_layouts(check, "lora", "--parallel", "fsdp", "--cpu_offload", "True")


def _compare_layouts(check: Check, recipe: str, *flags: str) -> None:
    """Compare the losses of FSDP2 on one rank with those of a run without FSDP2."""
    expected = [row["loss"] for row in _train_in_process(check, "single", recipe, ())]
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the hostname may not resolve offline
    distributed.init_single_rank(torch.device(check.device, 0))
    rows = _train_in_process(check, "fsdp", recipe, flags)
    distributed.destroy_process_group()
    losses = [row["loss"] for row in rows]
    check.add(parallel=rows[0]["plan"]["parallel"], losses={"fsdp": losses, "single": expected})
    check.expect(rows[0]["plan"]["parallel"] == "fsdp", "FSDP2 was not used")
    check.expect(len(losses) == len(expected), f"{len(losses)} steps instead of {len(expected)}")
    errors = [abs(a / b - 1) for a, b in zip(losses, expected, strict=False)]
    check.compare("losses", max(errors, default=math.nan), _LOSS_TOLERANCE)
    check.summary = f"{len(losses)} steps with the same losses as without FSDP2"


def _compare_memory(check: Check, name: str, planned: float, used: float) -> None:
    limit = planned * (1 + _UNPLANNED_FRACTION) + _UNPLANNED_BYTES
    check.add(**{f"{name}, used over planned memory": used / planned})
    check.expect(used <= limit, f"{name}: {used / _GB:.1f} GB used, {planned / _GB:.1f} GB planned")


def _jobs(check: Check, recipe: str, presets: list[str]) -> list[Job]:
    """Prepare the records for all steps; return the jobs of `train_throughput.py`, one per preset."""
    argv = ["--recipe", recipe, "--model", _MODELS[check.size], "--device", check.device, *_STEPS[check.size]]
    args = train_throughput.build_parser().parse_args(argv)
    args.steps = RECIPES[recipe].steps if args.steps is None else args.steps
    args.warmup = RECIPES[recipe].warmup if args.warmup is None else args.warmup
    train_throughput.prepare(args, check.folder)
    return train_throughput.plan_jobs(args, presets, check.folder)


def _measure(check: Check, job: Job, number: int) -> dict[str, Any]:
    """Run a job in a subprocess; return its table row with the result and (`fast` only) the memory plan."""
    result = run_in_subprocess(job, SCRIPT, number)
    row = train_throughput.row_of(job.label, job, [result])
    row |= {"first_loss": result.first_loss, "result": dataclasses.asdict(result)}
    plan = check.folder / f"job{number}/run" / PLAN
    return row | ({"plan": json.loads(plan.read_text(encoding="utf-8"))} if plan.is_file() else {})


def _train_in_process(check: Check, name: str, recipe: str, flags: tuple[str, ...]) -> list[dict[str, Any]]:
    """Train a small model in this process; return the metrics of each step, each with the memory plan."""
    device, folder = torch.device(check.device), check.folder / name
    folder.mkdir()
    job = Job(
        preset="fast", label=name, recipe=recipe, model=_SMALLER_MODELS[check.size], device=check.device,
        workload="", folder=str(folder), warmup=0, steps=3, flags=flags, dtype=default_dtype(check.device),
    )  # fmt: skip
    gc.collect()
    if check.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    torch.manual_seed(0)
    make_loop(job, _workload(check, job)).train()
    plan = json.loads((folder / "run" / PLAN).read_text(encoding="utf-8"))
    return [row | {"plan": plan} for row in read_metrics(job)]


def _workload(check: Check, job: Job) -> Workload:
    """Return the workload of a job that trains a small model; create it on first use."""
    folder = check.folder / job.recipe
    file = folder / "workload.json"
    if not file.is_file():
        folder.mkdir()
        records = job.settings.step_records * job.total_steps
        prepare_workload(
            folder, SHAPES[job.model], records=records, max_dynamic_patch=1, context_tokens=230
        ).save(file)
    return Workload.load(file)


def _describe(row: dict[str, Any], flags: str = "") -> str:
    mfu = f", MFU {row['mfu']:.1%}" if row["mfu"] else ""
    return (
        f"{flags.removeprefix('--')} {row['records_per_second']:.3g} records/s, "
        f"{row['tokens_per_second']:.0f} tokens/s{mfu}, {row['peak_memory_gb']:.1f} GB, "
        f"{row['epoch_hours']:.1f} h per epoch"
    ).strip()
