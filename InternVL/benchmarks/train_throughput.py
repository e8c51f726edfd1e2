"""Training throughput and peak memory of this project (`fast`), compared with the reference implementation.

Each preset runs in a separate process and trains on the same records, in the same steps, from the same
random weights. Prints a table and optionally writes JSON. The package need not be installed.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import jobs
from benchmarks.common import parse_names, write_report
from benchmarks.jobs import Job, Result
from benchmarks.presets.ablations import ablations
from benchmarks.presets.recipes import RECIPES, RECORDS_PER_EPOCH
from benchmarks.shapes import DTYPES, SHAPES, default_dtype
from benchmarks.workload import Workload, prepare_workload
from internvl_chat.utils.errors import M3LLMError

SCRIPT = Path(__file__).resolve()
PRESETS = ("reference", "fast")
PEER = "peer"
COLUMNS = (
    ("preset", "{:<37}"),
    ("recipe", "{:<7}"),
    ("model", "{:<13}"),
    ("device", "{:<6}"),
    ("dtype", "{:<8}"),
    ("records_per_second", "{:>10.3f}"),
    ("tokens_per_second", "{:>9.0f}"),
    ("mfu", "{:>6.1%}"),
    ("peak_memory_gb", "{:>8.2f}"),
    ("epoch_hours", "{:>8.1f}"),
)
HEADER = (
    "preset", "recipe", "model", "device", "dtype", "records/s", "tokens/s", "mfu", "peak GB", "epoch h",
    "x ref.",
)  # fmt: skip
# Relative tolerance of the first loss: bfloat16 has 8 significant bits.
LOSS_TOLERANCE = 0.002


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        prog="train_throughput.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Peak memory: on a GPU, the memory allocated by torch; on a CPU, the resident memory of the "
        "training\nprocess without its dataloader workers. MFU excludes recomputation."
        "\n\nExample: python InternVL/benchmarks/train_throughput.py --recipe lora --model mid "
        "--meta PMC-data.json \\\n  --tokenizer MODEL --presets reference,fast --peers --json result.json",
    )
    add = parser.add_argument
    add("--recipe", choices=tuple(RECIPES), default="lora", help="recipe (default: lora)")
    add("--model", choices=tuple(SHAPES), help="model shape (default: internvl3-8b on a GPU, mid on a CPU)")
    add("--presets", default=",".join(PRESETS), help="comma-separated: reference,fast (default: both)")
    add("--peers", action="store_true", help="also measure transformers' InternVL with Trainer and peft")
    add(
        "--ablate",
        action="store_true",
        help="also measure `fast` with one optimization at a time turned off or on",
    )
    add("--meta", help="meta file of the training records (default: synthetic records)")
    add("--tokenizer", help="tokenizer folder (default: train a tokenizer on the records)")
    add("--max_dynamic_patch", type=int, default=1, help="maximum tiles per record (default: 1)")
    add("--context_tokens", type=int, default=230,
        help="mean context length of synthetic records in tokens (default: 230; a record then has about 900 "
        "tokens)")  # fmt: skip
    add(
        "--steps",
        type=int,
        help="timed steps (default: 2 with 16 records each for lora, 12 with 2 records each for full)",
    )
    add("--warmup", type=int, help="untimed steps at the start (default: 1 for lora, 3 for full)")
    add(
        "--repeats",
        type=int,
        default=1,
        help="interleaved runs per preset; medians are reported (default: 1)",
    )
    add("--threads", type=int, default=0, help="CPU threads per process (default: all cores)")
    add("--device", choices=("cpu", "cuda"), help="device (default: cuda if available)")
    add(
        "--dtype",
        choices=tuple(DTYPES),
        help="dtype (default: bfloat16; float32 on a CPU without bf16 instructions)",
    )
    add("--json", metavar="FILE", help="write the results as JSON")
    add("--child", help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line and return the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.child:
        return measure(Path(args.child))
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU available")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.dtype is None:
        args.dtype = default_dtype(args.device)
        if args.dtype == "float32":
            print("This CPU has no bf16 instructions: all presets train in float32.", file=sys.stderr)
    args.model = args.model or ("mid" if args.device == "cpu" else "internvl3-8b")
    recipe = RECIPES[args.recipe]
    args.steps = recipe.steps if args.steps is None else args.steps
    args.warmup = recipe.warmup if args.warmup is None else args.warmup
    presets = parse_names(parser, "--presets", args.presets, PRESETS)
    if min(args.steps, args.repeats) < 1 or args.warmup < 0:
        parser.error("--steps and --repeats must be at least 1, and --warmup at least 0")
    try:
        with tempfile.TemporaryDirectory() as folder:
            prepare(args, Path(folder))
            planned = plan_jobs(args, presets, Path(folder))
            results = run_all(planned, args.repeats)
    except (RuntimeError, M3LLMError) as error:
        print(error, file=sys.stderr)
        return 1
    rows = [row_of(label, args, runs) for label, runs in results.items()]
    print(format_table(rows))
    if args.json:
        write_report(Path(args.json), args.device, **report(rows, results, args))
    return 0 if len(results) == len(planned) else 1


def prepare(args: argparse.Namespace, folder: Path) -> None:
    """Write the workload, with records for all steps, to a folder."""
    records = RECIPES[args.recipe].step_records * (args.warmup + args.steps)
    workload = prepare_workload(
        folder,
        SHAPES[args.model],
        records=records,
        max_dynamic_patch=args.max_dynamic_patch,
        meta=args.meta,
        tokenizer=args.tokenizer,
        context_tokens=args.context_tokens,
    )
    workload.save(folder / "workload.json")


def run_all(planned: Sequence[Job], repeats: int) -> dict[str, list[Result]]:
    """Run all jobs `repeats` times, interleaved; return the results of each job, keyed by label.

    An ablation that fails is reported and skipped.
    """
    results: dict[str, list[Result]] = {job.label: [] for job in planned}
    for number, job in enumerate([*planned] * repeats):
        if job.label not in results:
            continue
        try:
            result = jobs.run_in_subprocess(job, SCRIPT, number)
        except RuntimeError as error:
            if job.variant is None:
                raise
            print(error, file=sys.stderr)
            del results[job.label]
            continue
        results[job.label].append(result)
        rate = result.records / result.seconds
        print(f"{job.label}: {result.records} records in {result.seconds:.1f} s, {rate:.3f}/s, first loss "
              f"{result.first_loss:.4f}", file=sys.stderr, flush=True)  # fmt: skip
    check_same_work({label: runs[0] for label, runs in results.items()})
    return results


def plan_jobs(args: argparse.Namespace, presets: Sequence[str], folder: Path) -> list[Job]:
    """Return the jobs to run, in order: presets, the peer, and ablations."""
    dtype = args.dtype or default_dtype(args.device)

    def job(preset: str, label: str, variant: str | None = None) -> Job:
        return Job(preset=preset, label=label, recipe=args.recipe, model=args.model, device=args.device,
                   workload=str(folder / "workload.json"), folder=str(folder), warmup=args.warmup,
                   steps=args.steps, threads=args.threads, variant=variant,
                   dtype=dtype)  # fmt: skip

    planned = [job(preset, preset) for preset in [*presets, *([PEER] if args.peers else [])]]
    if args.ablate:
        planned += [job("fast", f"fast {n}", n) for n in ablations(args.recipe, args.device, dtype)]
    return planned


def check_same_work(results: dict[str, Result]) -> None:
    """Check that all jobs trained on the same number of records and tokens, and have the same first loss.

    Raises:
        RuntimeError: the number of records or tokens differs, or the first loss differs by more than the
            tolerance.
    """
    first_label, first = next(iter(results.items()))
    for label, result in results.items():
        if (result.records, result.tokens) != (first.records, first.tokens):
            raise RuntimeError(
                f"{label} trained on {result.records} records with {result.tokens} tokens, but {first_label} "
                f"on {first.records} with {first.tokens}"
            )
        # The peer averages the loss over supervised tokens, the other presets over records.
        name = "first_token_loss" if label == PEER else "first_loss"
        loss, expected = getattr(result, name), getattr(first, name)
        if expected is not None and abs(loss - expected) > LOSS_TOLERANCE * expected:
            raise RuntimeError(
                f"the first loss of {label} is {loss:.5f}, but that of {first_label} is {expected:.5f}; "
                f"they may differ by at most {LOSS_TOLERANCE:.1%}"
            )


def measure(job_file: Path) -> int:
    """Run a job in this process, which was started by `run_in_subprocess`; return the exit code."""
    job = jobs.read_job(job_file)
    if job.preset == "reference":
        from benchmarks.presets.reference import run
    elif job.preset == "fast":
        from benchmarks.presets.fast import run
    else:
        from benchmarks.presets.peer import run
    if job.threads:
        torch.set_num_threads(job.threads)
    workload, clock = Workload.load(Path(job.workload)), jobs.Clock(torch.device(job.device))
    torch.manual_seed(0)
    steps = run(job, workload, clock)
    jobs.write_result(job_file, jobs.result_of(job, workload, clock, steps))
    return 0


def row_of(label: str, args: argparse.Namespace, runs: Sequence[Result]) -> dict[str, Any]:
    """Return a table row with the median duration and the maximum peak memory of the runs."""
    seconds, first = statistics.median(run.seconds for run in runs), runs[0]
    rate = first.records / seconds
    return {
        "preset": label,
        "recipe": args.recipe,
        "model": args.model,
        "device": args.device,
        "dtype": args.dtype,
        "records_per_second": rate,
        "tokens_per_second": first.tokens / seconds,
        "mfu": first.flops / seconds / first.peak_flops if first.peak_flops else None,
        "peak_memory_gb": max(run.peak_memory for run in runs) / 1e9,
        "epoch_hours": RECORDS_PER_EPOCH / rate / 3600,
    }


def ratio(rows: Sequence[dict[str, Any]], preset: str = "fast") -> float | None:
    """Return the speed of a preset relative to the reference, or None if either is missing."""
    rates = {row["preset"]: row["records_per_second"] for row in rows}
    if preset not in rates or "reference" not in rates:
        return None
    return rates[preset] / rates["reference"]


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format the rows as a table, and add a column with the speed relative to the reference."""
    widths = [len(form.format(0) if "." in form else form.format("")) for _, form in COLUMNS]
    head = [
        f"{name:{'<' if i < 5 else '>'}{width}}"
        for i, (name, width) in enumerate(zip(HEADER[:-1], widths, strict=True))
    ]
    lines = [" ".join([*head, f"{HEADER[-1]:>7}"])]
    for row in rows:
        cells = [
            "-".rjust(width) if row[key] is None else form.format(row[key])
            for (key, form), width in zip(COLUMNS, widths, strict=True)
        ]
        relative = ratio(rows, row["preset"])
        lines.append(" ".join([*cells, "-".rjust(7) if relative is None else f"{relative:>7.2f}"]))
    return "\n".join(lines)


def report(
    rows: Sequence[dict[str, Any]], results: dict[str, list[Result]], args: argparse.Namespace
) -> dict[str, Any]:
    """Return the content of the JSON report."""
    first = next(iter(results.values()))[0]
    return {
        "rows": rows,
        "ratio": ratio(rows),
        "rounds": {label: [run.records / run.seconds for run in runs] for label, runs in results.items()},
        "same_work": {
            "records": first.records,
            "tokens": first.tokens,
            "first_loss": {label: runs[0].first_loss for label, runs in results.items()},
        },
        "arguments": {key: value for key, value in vars(args).items() if key != "child"},
    }


if __name__ == "__main__":
    sys.exit(main())
