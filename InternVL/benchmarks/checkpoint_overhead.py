"""Cost of checkpoints: duration of the step after an asynchronous or a synchronous save.

All steps train on the same records. The checkpoints of a random model are written to a temporary folder, or
to `--folder`, and deleted. Nothing is downloaded.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.common import parse_names, write_report
from benchmarks.jobs import Job
from benchmarks.presets.fast import make_loop, read_metrics
from benchmarks.presets.recipes import RECIPES, as_tokens
from benchmarks.shapes import SHAPES, default_dtype
from benchmarks.workload import Workload, prepare_workload
from internvl_chat.model.io.adapter import BaseModel, save_adapter
from internvl_chat.model.io.checkpoint import save_model
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel
from internvl_chat.utils.hashed_file import FileEntry

MODES = ("background", "synchronous")
MAX_RATIO = 1.5


@dataclass(frozen=True)
class Overhead:
    """Overhead of one save mode.

    Attributes:
        mode: one of `MODES`.
        checkpoint_gb: size of a checkpoint.
        median_seconds: median duration of all timed steps.
        after_save_seconds: duration of each step after a save; includes the save if it is synchronous.
        ratio: median of `after_save_seconds` relative to `median_seconds`.
        worst_ratio: maximum of `after_save_seconds` relative to `median_seconds`.
        seconds_a_save: extra time per save, relative to the median step.
    """

    mode: str
    checkpoint_gb: float
    median_seconds: float
    after_save_seconds: list[float]
    ratio: float
    worst_ratio: float
    seconds_a_save: float


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        prog="checkpoint_overhead.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Example: python InternVL/benchmarks/checkpoint_overhead.py --recipe full --model mid "
        "\\\n  --every 4 --steps 16 --json checkpoints.json",
    )
    add = parser.add_argument
    add("--recipe", choices=tuple(RECIPES), default="full", help="recipe (default: full)")
    add("--model", choices=tuple(SHAPES), help="model shape (default: internvl3-8b on a GPU, mid on a CPU)")
    add("--device", choices=("cpu", "cuda"), help="device (default: cuda if available)")
    add("--modes", default=",".join(MODES), help="comma-separated: background,synchronous (default: both)")
    add("--every", type=int, default=4, help="steps between saves (default: 4)")
    add("--steps", type=int, default=16, help="timed steps (default: 16)")
    add("--warmup", type=int, default=2, help="untimed steps at the start (default: 2)")
    add("--threads", type=int, default=0, help="CPU threads (default: all cores)")
    add("--folder", type=Path, help="folder of the checkpoints (default: temporary folder)")
    add("--json", metavar="FILE", type=Path, help="write the results as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line and return the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.model = args.model or ("mid" if args.device == "cpu" else "internvl3-8b")
    modes = parse_names(parser, "--modes", args.modes, MODES)
    if args.every < 2 or args.steps <= args.every or args.warmup < 0:
        parser.error(
            "--every must be at least 2, --steps must be larger than --every, and --warmup must be at least 0"
        )
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        workload = repeated_workload(args, Path(folder))
        for mode in modes:
            rows.append(measure(args, workload, mode, Path(folder)))
            print(format_row(args, rows[-1]), flush=True)
    if args.json:
        dtype = default_dtype(args.device)
        write_report(
            args.json,
            args.device,
            arguments=vars(args) | {"dtype": dtype},
            rows=[asdict(row) for row in rows],
        )
    return 0


def repeated_workload(args: argparse.Namespace, folder: Path) -> Workload:
    """Prepare the records of one step and repeat them for every step."""
    workload = prepare_workload(
        folder,
        SHAPES[args.model],
        records=RECIPES[args.recipe].step_records,
        max_dynamic_patch=1,
        context_tokens=230,
    )
    (entry,) = json.loads(Path(workload.meta).read_text(encoding="utf-8")).values()
    annotation = Path(entry["annotation"])
    times = args.warmup + args.steps
    annotation.write_text(annotation.read_text(encoding="utf-8") * times, encoding="utf-8")
    return replace(workload, sizes=workload.sizes * times)


def measure(args: argparse.Namespace, workload: Workload, mode: str, folder: Path) -> Overhead:
    """Train with the given save mode and return its overhead."""
    folder = folder / mode
    folder.mkdir()
    saving = {"save_strategy": "steps", "save_steps": args.every, "save_total_limit": 1}
    saving |= {"logging_strategy": "no", "async_save": mode == "background"}
    job = Job(
        preset="fast",
        label=mode,
        recipe=args.recipe,
        model=args.model,
        device=args.device,
        workload=workload.meta,
        folder=str(folder),
        warmup=args.warmup,
        steps=args.steps,
        flags=tuple(as_tokens(saving)),
        dtype=default_dtype(args.device),
    )
    torch.manual_seed(0)
    loop = make_loop(job, workload, _save_adapter if RECIPES[args.recipe].lora_rank else save_model)
    loop.train()
    seconds = [row["seconds"] + row["pause_seconds"] for row in read_metrics(job)]
    return summarize(mode, seconds, args.every, args.warmup, folder_bytes(folder / "run"))


def summarize(mode: str, seconds: Sequence[float], every: int, warmup: int, size: int) -> Overhead:
    """Compare the duration of the steps after a save with the median step.

    Args:
        mode: one of `MODES`.
        seconds: duration of each step, measured from the end of the previous step.
        every: steps between saves.
        warmup: number of untimed steps.
        size: size of a checkpoint in bytes.
    """
    timed = seconds[warmup:]
    after = [value for done, value in enumerate(seconds) if done >= warmup and done and done % every == 0]
    median = statistics.median(timed)
    return Overhead(
        mode=mode,
        checkpoint_gb=size / 1e9,
        median_seconds=median,
        after_save_seconds=after,
        ratio=statistics.median(after) / median,
        worst_ratio=max(after) / median,
        seconds_a_save=(sum(timed) - len(timed) * median) / len(after),
    )


def folder_bytes(run: Path) -> int:
    """Return the size of the checkpoint in a run folder."""
    return sum(file.stat().st_size for file in run.glob("checkpoint-*/**/*") if file.is_file())


def format_row(args: argparse.Namespace, row: Overhead) -> str:
    """Format a result as one line."""
    after = statistics.median(row.after_save_seconds)
    verdict = "within" if row.ratio <= MAX_RATIO else "over"
    return (
        f"{args.recipe} {args.model} {args.device}, {row.mode}: checkpoint {row.checkpoint_gb:.2f} GB, "
        f"median step {row.median_seconds:.2f} s, after a save {after:.2f} s ({row.ratio:.2f} times, "
        f"{verdict} {MAX_RATIO}; worst {row.worst_ratio:.2f}), {row.seconds_a_save:+.2f} s per save"
    )


def _save_adapter(
    model: InternVLChatModel, folder: Path, weights: dict[str, torch.Tensor]
) -> dict[str, FileEntry]:
    return save_adapter(model, folder, BaseModel("random weights", "0" * 64), weights)


if __name__ == "__main__":
    sys.exit(main())
