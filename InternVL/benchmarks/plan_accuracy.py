"""Accuracy of `m3llm plan`: measured against planned memory and time of every parallel layout, on CPU ranks.

A model with random weights trains under torchrun in each layout, with one CPU thread per rank.

- Memory: peak resident memory of a rank, minus its memory after it has trained a tiny model in the same layout,
  which loads all libraries.
- Time: CPU time of the slowest rank per step, because it does not depend on other programs on the machine. On
  an idle machine with one core per rank, it equals the duration of a step.
"""

import argparse
import dataclasses
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import psutil
import torch

from benchmarks.common import parse_names, write_report
from benchmarks.jobs import Job, peak_memory, read_job
from benchmarks.presets.fast import make_loop
from benchmarks.presets.recipes import RECIPE_FLAGS, RECIPES, as_tokens, fast_flags
from benchmarks.shapes import DTYPES, SHAPES, default_dtype
from benchmarks.workload import Workload as Prepared
from benchmarks.workload import prepare_workload
from internvl_chat.data.batching.collator import Pack
from internvl_chat.data.index.cache import Lengths
from internvl_chat.train.arguments import parse_arguments
from internvl_chat.train.monitor.step_metrics import StepRecord
from internvl_chat.train.planning.estimate import Estimate, PlannedModel, Planner
from internvl_chat.train.planning.hardware import cpu_hardware
from internvl_chat.train.planning.workload import Workload
from internvl_chat.utils import distributed

SCRIPT = Path(__file__).resolve()
ZERO = SCRIPT.parents[1] / "internvl_chat/shell/deepspeed"
_WARMUP_MODEL = "smoke"
LAYOUTS = ("single", "ddp", "fsdp", "zero1", "zero2", "zero3")
Row = dict[str, Any]


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        prog="plan_accuracy.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Example: python InternVL/benchmarks/plan_accuracy.py --layouts single,ddp,fsdp --json plan.json",
    )
    add = parser.add_argument
    add("--model", choices=tuple(SHAPES), default="small", help="model shape (default: small)")
    add("--recipes", default="lora,full", help="comma-separated: lora,full (default: both)")
    add("--layouts", default=",".join(LAYOUTS), help=f"comma-separated: {','.join(LAYOUTS)} (default: all)")
    add("--dtype", choices=tuple(DTYPES), help="dtype (default: bfloat16; float32 without bf16 instructions)")
    add("--ranks", type=int, default=2, help="ranks of all layouts except single (default: 2)")
    add("--steps", type=int, default=3, help="timed steps, after one untimed step (default: 3)")
    add("--json", metavar="FILE", type=Path, help="write the results as JSON")
    add("--child", type=Path, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line and return the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.child:
        return measure(args.child)
    args.dtype = args.dtype or default_dtype("cpu")
    recipes = parse_names(parser, "--recipes", args.recipes, tuple(RECIPES))
    layouts = parse_names(parser, "--layouts", args.layouts, LAYOUTS)
    rows: list[Row] = []
    records: dict[str, list] = {}
    with tempfile.TemporaryDirectory() as name:
        for recipe in recipes:
            workload = _workload(args.model, recipe, 1 + args.steps, Path(name) / recipe)
            _workload(_WARMUP_MODEL, recipe, 1, Path(name) / recipe / _WARMUP_MODEL)
            records[recipe] = [dataclasses.astuple(size) for size in Prepared.load(workload).sizes]
            for layout in layouts:
                rows.append(run_layout(args, recipe, layout, workload, Path(name) / f"{recipe}-{layout}"))
                print(rows[-1], flush=True)
        machine = measure_machine(args.dtype)
    if args.json:
        write_report(args.json, dtype=args.dtype, machine=machine, rows=rows, records=records)
    return 0


def _workload(model: str, recipe: str, steps: int, folder: Path) -> Path:
    folder.mkdir()
    workload = prepare_workload(
        folder,
        SHAPES[model],
        records=RECIPES[recipe].step_records * steps,
        max_dynamic_patch=1,
        context_tokens=230,
    )
    workload.save(folder / "workload.json")
    return folder / "workload.json"


def run_layout(args: argparse.Namespace, recipe: str, layout: str, workload: Path, folder: Path) -> Row:
    """Train in one layout under torchrun and return its measurements.

    Raises:
        RuntimeError: training failed; the message contains the end of its output.
    """
    ranks, records = 1 if layout == "single" else args.ranks, RECIPES[recipe].step_records
    flags = {
        "gradient_accumulation_steps": records // ranks,
        "dataloader_num_workers": 1,
        "weight_precision": "master",
    }
    if layout.startswith("zero"):
        flags["deepspeed"] = ZERO / f"{layout}.json"
    elif ranks > 1:
        flags["parallel"] = layout
    job = Job(
        preset="fast",
        label=layout,
        recipe=recipe,
        model=args.model,
        device="cpu",
        workload=str(workload),
        folder=str(folder),
        warmup=1,
        steps=args.steps,
        threads=1,
        flags=tuple(as_tokens(flags)),
        dtype=args.dtype,
    )
    folder.mkdir()
    (folder / "job.json").write_text(json.dumps(dataclasses.asdict(job)), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    environment = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [*command, str(SCRIPT), "--child", str(folder / "job.json")],
        capture_output=True,
        text=True,
        env=os.environ | environment | {"M3LLM_CACHE": str(folder)},
    )
    if done.returncode:
        raise RuntimeError(f"{recipe} {layout} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    row = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return {"model": args.model, "recipe": recipe, "layout": layout, "ranks": ranks, "dtype": args.dtype} | row


def measure(job_file: Path) -> int:
    """Run a job on this rank, which torchrun started; rank 0 writes the result next to the job file."""
    job = read_job(job_file)
    distributed.init_process_group(torch.device("cpu"), timedelta(minutes=10))
    torch.set_num_threads(1)
    workload, folder = Path(job.workload), Path(job.folder) / _WARMUP_MODEL
    folder.mkdir(exist_ok=True)
    tiny = dataclasses.replace(job, model=_WARMUP_MODEL, folder=str(folder), warmup=0, steps=1)
    _train(tiny, workload.parent / _WARMUP_MODEL / workload.name)
    gc.collect()
    baseline = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # reset the peak
    seconds = _train(job, workload)
    own = (peak_memory(torch.device("cpu")) - baseline, seconds[job.warmup :])
    ranks = distributed.all_gather_object(own)
    if distributed.rank() == 0:
        steps = list(zip(*(timed for _, timed in ranks), strict=True))
        result = {
            "measured_gb": max(peak for peak, _ in ranks) / 1e9,
            "measured_seconds": statistics.median(max(cpu for cpu, _ in step) for step in steps),
            "wall_seconds": statistics.median(max(wall for _, wall in step) for step in steps),
        }
        (job_file.parent / "result.json").write_text(json.dumps(result), encoding="utf-8")
    distributed.destroy_process_group()
    return 0


def _train(job: Job, workload: Path) -> list[tuple[float, float]]:
    """Train a job; return the CPU time and the wall-clock time of each step on this rank."""
    torch.manual_seed(0)
    loop = make_loop(job, Prepared.load(workload))
    train_step, seconds = loop.train_step, []

    def timed_step(step: int, packs: Sequence[Pack]) -> StepRecord:
        distributed.barrier()
        start, wall = time.process_time(), time.perf_counter()
        record = train_step(step, packs)
        seconds.append((time.process_time() - start, time.perf_counter() - wall))
        return record

    loop.train_step = timed_step
    loop.train()
    return seconds


def predict(row: Row, records: Sequence[Sequence[int]], machine: Row) -> Estimate:
    """Return the prediction of `m3llm plan` for a measured layout.

    Args:
        row: measurement.
        records: tokens, supervised tokens and tiles of each record, in order of training.
        machine: result of `measure_machine`.
    """
    recipe = RECIPES[row["recipe"]]
    step_records = recipe.step_records
    flags = RECIPE_FLAGS | fast_flags("cpu", row["dtype"] == "bfloat16") | {
        "model_name_or_path": "plan", "meta_path": "plan", "output_dir": "plan", "use_cpu": True,
        "bf16": row["dtype"] == "bfloat16", "weight_precision": "master",
        "gradient_accumulation_steps": step_records, "use_llm_lora": recipe.lora_rank,
        "freeze_llm": recipe.lora_rank > 0, "freeze_mlp": recipe.lora_rank > 0,
        "force_image_size": SHAPES[row["model"]].sizes.image_size,
    }  # fmt: skip
    config = parse_arguments(as_tokens(flags))
    planned = PlannedModel.build(config, SHAPES[row["model"]].config(), "cpu")
    tokens, supervised, tiles = np.array(records, np.int32).T
    workload = Workload(Lengths(tokens, supervised, tiles), len(tokens), "measured records", True)
    hardware = cpu_hardware(row["dtype"], 1e12, disk=1.0, price=None)
    estimates = Planner(planned, workload, hardware).compare(row["ranks"], 1, step_records)
    return next(estimate for estimate in estimates if estimate.mode.name == row["layout"])


def measure_machine(dtype: str) -> Row:
    """Measure one CPU core: FLOP/s of a large matrix product, and memory bandwidth of a copy in bytes/s."""
    torch.set_num_threads(1)
    a = torch.randn(2048, 2048).to(DTYPES[dtype])
    x = torch.zeros(1 << 26)
    y = torch.empty_like(x)
    product = min(_cpu_seconds(lambda: a @ a) for _ in range(4))
    copy = min(_cpu_seconds(lambda: y.copy_(x)) for _ in range(4))
    return {"flops_per_core": 2 * 2048**3 / product, "memory_bandwidth": 2 * x.nbytes / copy}


def _cpu_seconds(function: Any) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


if __name__ == "__main__":
    sys.exit(main())
