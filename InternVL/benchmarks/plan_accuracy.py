"""Accuracy of `m3llm plan`: planned and measured memory and time of every parallel layout, on CPU ranks.

A model with random weights trains under torchrun in each layout, with one CPU thread per rank.

- Memory: peak resident memory of a rank, minus its memory before the model is built. The rank has already
  trained the same model, which loads all libraries; oneDNN keeps compiled kernels for each shape, over
  100 MB in bf16. Each tensor has its own memory mapping: on the heap, the memory of freed tensors would
  stay resident and count as used.
- Time: CPU time of the slowest rank per step, because it does not depend on other programs on the machine. On
  an idle machine with one core per rank, it equals the duration of a step.
"""

import argparse
import ctypes
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
from scipy.optimize import nnls

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
from internvl_chat.train.planning.hardware import Efficiency, Hardware, cpu_hardware
from internvl_chat.train.planning.speed import optimizer_bytes
from internvl_chat.train.planning.workload import Workload
from internvl_chat.utils import distributed
from internvl_chat.utils.gpus import Gpu, find_gpu

SCRIPT = Path(__file__).resolve()
ZERO = SCRIPT.parents[1] / "internvl_chat/shell/deepspeed"
RESULTS = SCRIPT.parent / "results"
CALIBRATION = SCRIPT.parents[1] / "internvl_chat/train/planning/calibration.json"
# Records per step: fewer than in the LoRA recipe, to save time.
STEP_RECORDS = {"lora": 4, "full": 2}
# Options of glibc's mallopt.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# Smallest allocation with its own memory mapping: to measure memory, and glibc's maximum, which its adaptive
# threshold approaches when large tensors are freed.
_MAPPED, _LARGEST_THRESHOLD = 1 << 16, 1 << 25
# Layouts from which the CPU's efficiency is derived.
_FITTED = ("single", "ddp")
# Assumed efficiency of GPUs that have not been measured.
ASSUMED = {
    "compute": 0.4,
    "memory": 0.75,
    "link": 0.7,
    "overlap": 0.5,
    "step_seconds": 0.02,
    "pack_seconds": 0.02,
    "source": "others report 33% to 46% for language models with 7 to 8 B parameters on H100",
    "measured": False,
}
LAYOUTS = ("single", "ddp", "fsdp", "zero1", "zero2", "zero3")
Row = dict[str, Any]


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        prog="plan_accuracy.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Example: python InternVL/benchmarks/plan_accuracy.py --layouts single,ddp --json plan.json",
    )
    add = parser.add_argument
    add("--model", choices=tuple(SHAPES), default="small", help="model shape (default: small)")
    add("--recipes", default="lora,full", help="comma-separated: lora,full (default: both)")
    add("--layouts", default=",".join(LAYOUTS), help=f"comma-separated: {','.join(LAYOUTS)} (default: all)")
    add("--dtype", choices=tuple(DTYPES), help="dtype (default: bfloat16; float32 without bf16 instructions)")
    add("--ranks", type=int, default=2, help="ranks of all layouts except single (default: 2)")
    add("--steps", type=int, default=3, help="timed steps, after one untimed step (default: 3)")
    add("--json", metavar="FILE", type=Path, help="write the results as JSON")
    add("--check", type=Path, nargs="+", metavar="FILE", help="compare earlier results; measure nothing")
    add("--calibrate", action="store_true",
        help="derive the package's calibration.json from benchmarks/results; measure nothing")  # fmt: skip
    add("--child", type=Path, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line and return the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.child:
        return measure(args.child)
    if args.calibrate:
        CALIBRATION.write_text(json.dumps(calibrate(RESULTS), indent=2) + "\n", encoding="utf-8")
        return 0
    if args.check:
        reports = [json.loads(file.read_text(encoding="utf-8")) for file in args.check]
        for row in compare(reports):
            print(format_row(row))
        return 0
    args.dtype = args.dtype or default_dtype("cpu")
    recipes = parse_names(parser, "--recipes", args.recipes, tuple(RECIPES))
    layouts = parse_names(parser, "--layouts", args.layouts, LAYOUTS)
    rows: list[Row] = []
    records: dict[str, list] = {}
    with tempfile.TemporaryDirectory() as name:
        for recipe in recipes:
            workload = _workload(args.model, recipe, args.steps, Path(name) / recipe)
            records[recipe] = [dataclasses.astuple(size) for size in Prepared.load(workload).sizes]
            for layout in layouts:
                row = run_layout(args, recipe, layout, workload, Path(name) / f"{recipe}-{layout}")
                rows += compare([{"rows": [row], "records": records}])
                print(format_row(rows[-1]), flush=True)
        machine = measure_machine(args.dtype)
    if args.json:
        write_report(args.json, dtype=args.dtype, machine=machine, rows=rows, records=records)
    return 0


def format_row(row: Row) -> str:
    """Format a row as one line of the table."""
    layout = f"{row['model']:<6} {row['recipe']:<4} {row['dtype']:<8} {row['layout']:<6} x {row['ranks']}"
    memory = f"{row['measured_gb']:6.3f} GB, planned {row['planned_gb']:6.3f} ({row['memory_error']:+.0%})"
    time = (
        f"{row['measured_seconds']:6.2f} s, planned {row['planned_seconds']:6.2f} ({row['time_error']:+.0%})"
    )
    return f"{layout}: {memory}; {time}"


def _workload(model: str, recipe: str, steps: int, folder: Path) -> Path:
    """Write the records of `steps` timed steps, preceded by an untimed step with the records of the first.

    Otherwise, the step with the largest pack could run before the optimizer state exists.
    """
    folder.mkdir()
    count = STEP_RECORDS[recipe]
    workload = prepare_workload(
        folder, SHAPES[model], records=count * steps, max_dynamic_patch=1, context_tokens=230
    )
    annotation = folder / "records.jsonl"
    lines = annotation.read_text(encoding="utf-8").splitlines(keepends=True)
    annotation.write_text("".join(lines[:count] + lines), encoding="utf-8")
    sizes = workload.sizes[:count] + workload.sizes
    dataclasses.replace(workload, sizes=sizes).save(folder / "workload.json")
    return folder / "workload.json"


def run_layout(args: argparse.Namespace, recipe: str, layout: str, workload: Path, folder: Path) -> Row:
    """Train in one layout under torchrun and return its measurements.

    Raises:
        RuntimeError: training failed; the message contains the end of its output.
    """
    ranks, records = 1 if layout == "single" else args.ranks, STEP_RECORDS[recipe]
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
    return {
        "model": args.model,
        "recipe": recipe,
        "layout": layout,
        "ranks": ranks,
        "dtype": args.dtype,
    } | row


def measure(job_file: Path) -> int:
    """Run a job on this rank, which torchrun started; rank 0 writes the result next to the job file."""
    job = read_job(job_file)
    distributed.init_process_group(torch.device("cpu"), timedelta(minutes=10))
    torch.set_num_threads(1)
    workload, libc = Path(job.workload), ctypes.CDLL("libc.so.6")
    _set_malloc_threshold(libc, _MAPPED)
    _train(job, workload, "warmup")
    gc.collect()
    libc.malloc_trim(0)
    baseline = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # reset the peak
    _train(job, workload, "memory")
    peak = peak_memory(torch.device("cpu")) - baseline
    _set_malloc_threshold(libc, _LARGEST_THRESHOLD)  # mapping each tensor takes time
    seconds = _train(job, workload, "timed")[job.warmup :]
    ranks = distributed.all_gather_object((peak, seconds))
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


def _set_malloc_threshold(libc: ctypes.CDLL, size: int) -> None:
    """Make glibc give each allocation of at least `size` bytes a mapping, which is unmapped when it is freed.

    Smaller allocations may reuse freed memory of the heap, which stays resident.
    """
    libc.mallopt(_M_MMAP_THRESHOLD, size)
    libc.mallopt(_M_TRIM_THRESHOLD, 2 * size)


def _train(job: Job, workload: Path, name: str) -> list[tuple[float, float]]:
    """Train a job in a new folder; return CPU time and wall-clock time of each step on this rank."""
    folder = Path(job.folder) / name
    folder.mkdir(exist_ok=True)
    job = dataclasses.replace(job, folder=str(folder))
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


def plan_model(model: str, recipe: str, dtype: str, device: str) -> PlannedModel:
    """Return a model of `SHAPES` for a recipe, without weights, with the flags of the `fast` preset."""
    shape, rank = SHAPES[model], RECIPES[recipe].lora_rank
    flags = RECIPE_FLAGS | fast_flags(device, dtype == "bfloat16") | {
        "model_name_or_path": "plan", "meta_path": "plan", "output_dir": "plan", "use_cpu": True,
        "bf16": dtype == "bfloat16", "weight_precision": "master", "use_llm_lora": rank,
        "freeze_llm": rank > 0, "freeze_mlp": rank > 0, "force_image_size": shape.sizes.image_size,
    }  # fmt: skip
    return PlannedModel.build(parse_arguments(as_tokens(flags)), shape.config(), device)


def predict(row: Row, records: Sequence[Sequence[int]], hardware: Hardware | None = None) -> Estimate:
    """Return the prediction of `m3llm plan` for a measured layout.

    Args:
        row: measurement.
        records: tokens, supervised tokens and tiles of each record, in order of training.
        hardware: hardware of a rank (default: a core, with the package's calibration).
    """
    planned = plan_model(row["model"], row["recipe"], row["dtype"], "cpu")
    step_records = STEP_RECORDS[row["recipe"]]
    tokens, supervised, tiles = np.array(records[step_records:], np.int32).T  # without the untimed step
    workload = Workload(Lengths(tokens, supervised, tiles), len(tokens), "measured records", True)
    hardware = hardware or cpu_hardware(row["dtype"], 1e12, disk=1.0, price=None)
    estimates = Planner(planned, workload, hardware).compare(row["ranks"], 1, step_records)
    return next(estimate for estimate in estimates if estimate.mode.name == row["layout"])


def compare(reports: Sequence[Row]) -> list[Row]:
    """Return the measured rows of all reports with predictions and relative errors."""
    rows = []
    for report in reports:
        for row in report["rows"]:
            found = predict(row, report["records"][row["recipe"]])
            planned = {"planned_gb": found.memory.total / 1e9, "planned_seconds": found.step.total}
            errors = {
                f"{name}_error": planned[f"planned_{unit}"] / row[f"measured_{unit}"] - 1
                for name, unit in (("memory", "gb"), ("time", "seconds"))
            }
            rows.append(row | planned | errors)
    return rows


def calibrate(results: Path) -> Row:
    """Return the content of `calibration.json`, derived from the results of this and other benchmarks.

    - CPU: times per FLOP, per byte of optimizer traffic, per byte sent and per pack that fit the layouts in
      `_FITTED` best. The other layouts are predictions.
    - GPU: FLOP/s of the passes in `train_throughput.py`, with the assumed values for everything else.
    """
    efficiency: Row = {"cuda": ASSUMED}
    machines: Row = {}
    reports = [
        (file, json.loads(file.read_text(encoding="utf-8"))) for file in sorted(results.glob("*.json"))
    ]
    for dtype in DTYPES:
        found = [(file, r) for file, r in reports if file.name.startswith("plan-") and r["dtype"] == dtype]
        if found:
            machines[dtype] = found[0][1]["machine"]
            names = ", ".join(file.name for file, _ in found)
            efficiency[f"cpu-{dtype}"] = _fit([r for _, r in found], machines[dtype]) | {"source": names}
    for file, report in reports:
        gpu = find_gpu(report.get("hardware", ""))
        rows = [row for row in report.get("rows", ()) if row.get("preset") == "fast" and row.get("mfu")]
        if gpu and rows:
            computes = [_gpu_compute(row, gpu) for row in rows]
            efficiency[gpu.name] = ASSUMED | {
                "compute": statistics.mean(computes), "measured": True, "source": file.name
            }  # fmt: skip
    return {"cpu": machines, "efficiency": efficiency}


def _fit(reports: Sequence[Row], machine: Row) -> Row:
    """Return the efficiency that minimizes the relative errors of the planned times of the fitted layouts."""
    work, seconds = [], []
    # The work does not depend on these rates.
    efficiency = Efficiency(**ASSUMED)
    core = Hardware("core", "cpu", 1e12, 1e9, 1e9, 1e9, 1e9, 1e9, price=None, efficiency=efficiency)
    for report in reports:
        for row in report["rows"]:
            if row["layout"] in _FITTED:
                work.append(predict(row, report["records"][row["recipe"]], core).work)
                seconds.append(row["measured_seconds"])
    columns = np.array([[w.flops, w.updated, w.sent, w.packs] for w in work]) / np.array(seconds)[:, None]
    scale = columns.max(axis=0)
    per_flop, per_update, per_byte, per_pack = nnls(columns / scale, np.ones(len(seconds)))[0] / scale
    bandwidth = machine["memory_bandwidth"]
    return {
        "compute": 1 / (per_flop * machine["flops_per_core"]),
        "memory": min(1.0, 1 / max(per_update * bandwidth, 1e-9)),
        "link": min(1.0, 1 / max(per_byte * bandwidth, 1e-9)),
        "overlap": 0.0,
        "step_seconds": 0.0,
        "pack_seconds": per_pack,
        "measured": True,
    }


def _gpu_compute(row: Row, gpu: Gpu) -> float:
    """Return the achieved fraction of the peak FLOP/s in the passes, from a row of `train_throughput.py`."""
    planned = plan_model(row["model"], row["recipe"], row["dtype"], "cuda")
    seconds = RECIPES[row["recipe"]].step_records / row["records_per_second"]
    updated = optimizer_bytes(planned.trained, "master", compiled=True)
    other = updated / (ASSUMED["memory"] * gpu.bandwidth_gbs * 1e9)
    other += ASSUMED["step_seconds"] + ASSUMED["pack_seconds"]
    return row["mfu"] * seconds / (seconds - other)


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
