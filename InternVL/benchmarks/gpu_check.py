"""Acceptance run on one GPU: kernels, launchers, resume, memory, decoding, compilation and training speed.

Each item runs in a separate process with a time limit; if an item fails, the remaining items still run.
Weights are random, records are synthetic, and nothing is downloaded. Without a GPU, the model is small.
"""

import argparse
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil

from benchmarks.common import parse_names
from benchmarks.gpu.check import SIZES, Check, read_result

SCRIPT = Path(__file__).resolve()
REPOSITORY = SCRIPT.parents[2]
RESULTS, LOG = "gpu_check.json", "gpu_check.log"
# An item is skipped if less time than this is left.
_MIN_SECONDS = 5.0
# Factor on the time limits on a CPU, which may be shared.
_CPU_FACTOR = 4


@dataclass(frozen=True)
class Item:
    """An item of the acceptance run.

    Attributes:
        name: name in the table.
        function: `module:function` in `benchmarks.gpu`; the function is called with a `Check`.
        seconds: time limit on a GPU.
    """

    name: str
    function: str
    seconds: float


# Most important items first, because time may run out before the last ones.
ITEMS = (
    Item("doctor", "launchers:doctor", 60),
    Item("attention", "kernels:attention", 60),
    Item("launchers", "launchers:launchers", 120),
    Item("train-lora", "training:train_lora", 150),
    Item("train-full", "training:train_full", 180),
    Item("decoding", "decoding:decoding", 75),
    Item("resume", "launchers:resume", 120),
    Item("checkpoint", "training:checkpoint", 90),
    Item("memory", "training:memory", 60),
    Item("optimizer", "kernels:optimizer", 60),
    Item("fsdp", "training:fsdp", 60),
    Item("cpu-offload", "training:cpu_offload", 60),
    Item("deepspeed", "launchers:deepspeed", 90),
    Item("compile", "training:compiled_blocks", 150),
)
NAMES = tuple(item.name for item in ITEMS)


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        prog="gpu_check.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="The exit code is 1 if an item failed.\n\n"
        "Example: bash InternVL/internvl_chat/shell/gpu_check.sh --out work_dirs/gpu_check",
    )
    add = parser.add_argument
    add("--size", choices=SIZES, help="model size (default: 8b on a GPU, small on a CPU)")
    add("--out", type=Path, default=REPOSITORY / "work_dirs/gpu_check",
        help=f"folder for {RESULTS} and {LOG} (default: work_dirs/gpu_check)")  # fmt: skip
    add(
        "--minutes",
        type=float,
        default=10.0,
        help="time limit in minutes; items that do not fit are killed or skipped (default: 10)",
    )
    add("--items", default=",".join(NAMES), help="comma-separated items (default: all)")
    add("--device", choices=("cpu", "cuda"), help="device (default: cuda if available)")
    add("--child", nargs=2, metavar=("ITEM", "FOLDER"), help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line and return the exit code."""
    began = time.monotonic()
    parser = build_parser()
    args = parser.parse_args(argv)
    selected = parse_names(parser, "--items", args.items, NAMES)
    if args.child:
        name, work = args.child
        (item,) = (item for item in ITEMS if item.name == name)
        Check(name, Path(work), args.size, args.device).run(lambda check: _function(item)(check))
        return 0
    args.device = args.device or _find_device()
    args.size = args.size or ("8b" if args.device == "cuda" else "small")
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="gpu_check-", ignore_cleanup_errors=True) as work,
        (args.out / LOG).open("w", encoding="utf-8") as log,
    ):
        for item in ITEMS:
            if item.name not in selected:
                continue
            left = 60 * args.minutes - (time.monotonic() - began)
            results[item.name] = result = run_item(item, args, Path(work), left, log)
            print(
                f"{item.name}: {result['status']} in {result['seconds']:.0f} s", file=sys.stderr, flush=True
            )
            # Written after each item, so that a killed run leaves partial results.
            write_results(args, results, time.monotonic() - began)
    print(format_table(results))
    print(f"results: {args.out / RESULTS}, output of all items: {args.out / LOG}")
    return 1 if any(result["status"] == "failed" for result in results.values()) else 0


def run_item(item: Item, args: argparse.Namespace, work: Path, left: float, log: IO[str]) -> dict[str, Any]:
    """Run an item in a subprocess and return its result; kill it at its limit or after `left` seconds."""
    if left < _MIN_SECONDS:
        return {"status": "skipped", "why": "no time left", "summary": "", "figures": {}, "seconds": 0.0}
    seconds = min(item.seconds * (1 if args.device == "cuda" else _CPU_FACTOR), left)
    began = time.monotonic()
    print(f"==== {item.name}", file=log, flush=True)
    command = [sys.executable, str(SCRIPT), "--child", item.name, str(work), "--size", args.size,
               "--device", args.device]  # fmt: skip
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        env=os.environ | environment(args.device, work),
    )  # fmt: skip
    why = None
    try:
        code = process.wait(seconds)
        if code:
            why = f"exit code {code}"
    except subprocess.TimeoutExpired:
        why = f"took longer than {seconds:.0f} s"
    finally:
        kill_processes(process)
    result = read_result(work, item.name) or {"status": "failed", "summary": "", "figures": {}}
    if why is not None:
        result |= {"status": "failed", "why": why}
        for file in sorted((work / item.name).rglob("log.txt")):  # logs of the item's child processes
            text = file.read_text(encoding="utf-8", errors="replace")
            print(f"---- {file.relative_to(work)}\n{text[-2000:]}", file=log, flush=True)
    return result | {"seconds": round(time.monotonic() - began, 1)}


def environment(device: str, work: Path) -> dict[str, str]:
    """Return environment variables for an item: those of the launchers, offline mode, a temporary cache."""
    variables = {
        "PYTHON": sys.executable,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTORCH_ALLOC_CONF": os.environ.get("PYTORCH_ALLOC_CONF", "expandable_segments:True"),
        "M3LLM_CACHE": str(work / "cache"),
        "PYTHONUNBUFFERED": "1",
    }
    return variables | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})


def kill_processes(process: subprocess.Popen) -> None:
    """Kill an item and all its child processes, if it is still running."""
    try:
        running = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for child in running:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()


def write_results(args: argparse.Namespace, results: dict[str, dict[str, Any]], seconds: float) -> None:
    """Write the results so far, with the date, hardware and library versions."""
    facts = results.get("doctor", {}).get("figures", {})
    gpus, packages = facts.get("gpus") or [], facts.get("packages") or {}
    report = {
        "date": datetime.date.today().isoformat(),
        "hardware": gpus[0]["name"] if gpus else f"{os.cpu_count()} CPU cores",
        "versions": packages.get("installed", {}),
        "device": args.device,
        "size": args.size,
        "seconds": round(seconds, 1),
        "ok": all(result["status"] != "failed" for result in results.values()),
        "items": [{"name": name, **result} for name, result in results.items()],
    }
    text = json.dumps(report, indent=2, ensure_ascii=False)
    (args.out / RESULTS).write_text(text + "\n", encoding="utf-8")


def format_table(results: dict[str, dict[str, Any]]) -> str:
    """Format the results as a table with one line per item."""
    rows = [("item", "status", "seconds", "")]
    for name, result in results.items():
        note = "; ".join(filter(None, (result["why"], result["summary"]))).replace("\n", " ")
        rows.append((name, result["status"], f"{result['seconds']:.0f}", note[:400]))
    return "\n".join(f"{a:<11} {b:<8} {c:>7}  {d}".rstrip() for a, b, c, d in rows)


def _function(item: Item) -> Any:
    module, _, name = item.function.partition(":")
    return getattr(import_module(f"benchmarks.gpu.{module}"), name)


def _find_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    # On SIGTERM, raise SystemExit, so that the running item is killed as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
