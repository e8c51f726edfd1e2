"""How fast training is, and in how much memory: this project's trainer (`fast`) beside the reference's way.

Every preset trains the same records, in the same steps, from the same random weights, each in a process of
its own. One command prints a table and writes JSON; it needs no installation, no weights and no data.
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
from benchmarks.ablations import ablations
from benchmarks.jobs import Job, Result
from benchmarks.options import names_of
from benchmarks.recipes import RECIPES, RECORDS_AN_EPOCH
from benchmarks.report import write_report
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
HEADS = (
    "preset",
    "recipe",
    "model",
    "device",
    "dtype",
    "records/s",
    "tokens/s",
    "mfu",
    "peak GB",
    "epoch h",
    "x ref.",
)
# The first step's losses may differ by this share: bfloat16 has 8 bits. The peer takes the mean over the
# step's tokens, not over its records.
LOSS_TOLERANCE = 0.002
PEER_TOLERANCE = 0.02


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="train_throughput.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Peak memory is, on a GPU, what torch allocated there; on a CPU, the resident memory of the "
        "training\nprocess itself, without its loader processes. mfu counts the model's operations without "
        "recomputation.\n\nExample: python InternVL/benchmarks/train_throughput.py --recipe lora --model mid "
        "--meta PMC-data.json \\\n  --tokenizer MODEL --presets reference,fast --peers --json result.json",
    )
    add = parser.add_argument
    add("--recipe", choices=tuple(RECIPES), default="lora", help="what is trained [lora]")
    add("--model", choices=tuple(SHAPES), help="shape of the model [internvl3-8b on a GPU, mid on a CPU]")
    add("--presets", default=",".join(PRESETS), help="any of reference,fast [both]")
    add("--peers", action="store_true", help="also transformers' own InternVL under its Trainer, with peft")
    add("--ablate", action="store_true", help="also fast with each of its levers pulled the other way alone")
    add("--meta", help="a meta file (PMC-data.json) of records to train on [the benchmark makes its own]")
    add("--tokenizer", help="folder of a tokenizer [one is trained on the records' text]")
    add("--max_dynamic_patch", type=int, default=1, help="most tiles of a record [1, as published]")
    add("--context_tokens", type=int, default=230,
        help="mean context in own records; with 230 they have about 900 tokens [230]")  # fmt: skip
    add("--steps", type=int, help="timed steps [2 of 16 records for lora, 12 of 2 for full]")
    add("--warmup", type=int, help="untimed steps before them [1 for lora, 3 for full]")
    add(
        "--repeats",
        type=int,
        default=1,
        help="run every preset so many times, in turn; medians are shown [1]",
    )
    add("--threads", type=int, default=0, help="CPU threads of a process [all cores]")
    add("--device", choices=("cpu", "cuda"), help="where to train [cuda if there is one]")
    add("--dtype", choices=tuple(DTYPES), help="of all presets [float32 on a CPU without bf16 instructions]")
    add("--json", metavar="FILE", help="also write the table here")
    add("--child", help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.child:
        return measure(Path(args.child))
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.dtype is None:
        args.dtype = default_dtype(args.device)
        if args.dtype == "float32":
            print("This CPU has no bf16 instructions: all presets train in float32.", file=sys.stderr)
    args.model = args.model or ("mid" if args.device == "cpu" else "internvl3-8b")
    recipe = RECIPES[args.recipe]
    args.steps = recipe.steps if args.steps is None else args.steps
    args.warmup = recipe.warmup if args.warmup is None else args.warmup
    presets = names_of(parser, "--presets", args.presets, PRESETS)
    if min(args.steps, args.repeats) < 1 or args.warmup < 0:
        parser.error("--steps and --repeats must be at least 1, and --warmup at least 0")
    try:
        with tempfile.TemporaryDirectory() as folder:
            prepare(args, Path(folder))
            orders = plan_jobs(args, presets, Path(folder))
            results = run_all(orders, args.repeats)
    except (RuntimeError, M3LLMError) as error:
        print(error, file=sys.stderr)
        return 1
    rows = [row_of(label, args, runs) for label, runs in results.items()]
    print(format_table(rows))
    if args.json:
        write_report(Path(args.json), args.device, **figures(rows, results, args))
    return 0 if len(results) == len(orders) else 1


def prepare(args: argparse.Namespace, folder: Path) -> None:
    """Write the records of all steps into a folder."""
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


def run_all(orders: Sequence[Job], repeats: int) -> dict[str, list[Result]]:
    """Measure every preset so many times in turn; a variant of `fast` that fails is told and left out."""
    results: dict[str, list[Result]] = {job.label: [] for job in orders}
    for number, job in enumerate([*orders] * repeats):
        if job.label not in results:
            continue
        try:
            result = jobs.run_in_a_process(job, SCRIPT, number)
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
    """Return the measurements to make, in order."""
    dtype = args.dtype or default_dtype(args.device)

    def job(preset: str, label: str, variant: str | None = None) -> Job:
        return Job(preset=preset, label=label, recipe=args.recipe, model=args.model, device=args.device,
                   workload=str(folder / "workload.json"), folder=str(folder), warmup=args.warmup,
                   steps=args.steps, threads=args.threads, variant=variant,
                   dtype=dtype)  # fmt: skip

    found = [job(preset, preset) for preset in presets]
    if args.peers:
        found.append(job(PEER, PEER))
    if args.ablate:
        names = ablations(args.recipe, args.device, dtype)
        found += [job("fast", f"fast {name}", name) for name in names]
    return found


def check_same_work(results: dict[str, Result]) -> None:
    """Raise a RuntimeError unless all presets went through the same tokens to the same first loss."""
    first_label, first = next(iter(results.items()))
    for label, result in results.items():
        if (result.records, result.tokens) != (first.records, first.tokens):
            raise RuntimeError(
                f"{label} trained {result.records} records of {result.tokens} tokens, but {first_label} "
                f"{first.records} of {first.tokens}"
            )
        tolerance = PEER_TOLERANCE if PEER in (label, first_label) else LOSS_TOLERANCE
        if abs(result.first_loss - first.first_loss) > tolerance * first.first_loss:
            raise RuntimeError(
                f"{label} has the loss {result.first_loss:.5f} in its first step, but {first_label} "
                f"{first.first_loss:.5f}"
            )


def measure(order: Path) -> int:
    """Run one job, in a process that another has started for it."""
    job = jobs.read_job(order)
    if job.preset == "reference":
        from benchmarks.reference import run
    elif job.preset == "fast":
        from benchmarks.ours import run
    else:
        from benchmarks.peer import run
    if job.threads:
        torch.set_num_threads(job.threads)
    workload, clock = Workload.load(Path(job.workload)), jobs.Clock(torch.device(job.device))
    torch.manual_seed(0)
    steps = run(job, workload, clock)
    jobs.write_result(order, jobs.result_of(job, workload, clock, steps))
    return 0


def row_of(label: str, args: argparse.Namespace, runs: Sequence[Result]) -> dict[str, Any]:
    """Return a row of the table: medians over the runs, the most memory of any."""
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
        "epoch_hours": RECORDS_AN_EPOCH / rate / 3600,
    }


def ratio(rows: Sequence[dict[str, Any]], preset: str = "fast") -> float | None:
    """Return a preset's records a second over the reference's, or None where one is missing."""
    rates = {row["preset"]: row["records_per_second"] for row in rows}
    if preset not in rates or "reference" not in rates:
        return None
    return rates[preset] / rates["reference"]


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as text, each also in multiples of the reference."""
    widths = [len(form.format(0) if "." in form else form.format("")) for _, form in COLUMNS]
    head = [
        f"{name:{'<' if i < 5 else '>'}{width}}"
        for i, (name, width) in enumerate(zip(HEADS[:-1], widths, strict=True))
    ]
    lines = [" ".join([*head, f"{HEADS[-1]:>7}"])]
    for row in rows:
        cells = [
            "-".rjust(width) if row[key] is None else form.format(row[key])
            for (key, form), width in zip(COLUMNS, widths, strict=True)
        ]
        relative = ratio(rows, row["preset"])
        lines.append(" ".join([*cells, "-".rjust(7) if relative is None else f"{relative:>7.2f}"]))
    return "\n".join(lines)


def figures(
    rows: Sequence[dict[str, Any]], results: dict[str, list[Result]], args: argparse.Namespace
) -> dict[str, Any]:
    """Return what `--json` writes."""
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
