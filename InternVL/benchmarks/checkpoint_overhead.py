"""What a checkpoint costs training: the steps after a save beside all, written in the background or not.

Every step trains the same records, so that steps compare. Nothing is downloaded; the checkpoints of a random
model go to the folder for temporary files, or to `--folder`, and are deleted.
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

from benchmarks.flags import as_tokens
from benchmarks.jobs import Job
from benchmarks.options import names_of
from benchmarks.ours import make_loop, read_metrics
from benchmarks.recipes import RECIPES
from benchmarks.report import write_report
from benchmarks.shapes import SHAPES, default_dtype
from benchmarks.workload import Workload, prepare_workload
from internvl_chat.model.adapter import BaseModel, save_adapter
from internvl_chat.model.checkpoint import save_model
from internvl_chat.model.modeling import InternVLChatModel
from internvl_chat.utils.hashed_file import FileEntry

MODES = ("background", "synchronous")
LIMIT = 1.5


@dataclass(frozen=True)
class Overhead:
    """What was measured of one way to save.

    Attributes:
        mode: one of `MODES`.
        checkpoint_gb: size of a checkpoint.
        median_seconds: of all timed steps.
        after_save_seconds: of each step after a save, the save included where training waits for it.
        ratio: of the median of these to the median of all.
        worst_ratio: of the slowest of these.
        seconds_a_save: what a save added to the steps, wherever it did.
    """

    mode: str
    checkpoint_gb: float
    median_seconds: float
    after_save_seconds: list[float]
    ratio: float
    worst_ratio: float
    seconds_a_save: float


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="checkpoint_overhead.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Example: python InternVL/benchmarks/checkpoint_overhead.py --recipe full --model mid "
        "\\\n  --every 4 --steps 16 --json checkpoints.json",
    )
    add = parser.add_argument
    add("--recipe", choices=tuple(RECIPES), default="full", help="what is trained [full]")
    add("--model", choices=tuple(SHAPES), help="shape of the model [internvl3-8b on a GPU, mid on a CPU]")
    add("--device", choices=("cpu", "cuda"), help="where to train [cuda if there is one]")
    add("--modes", default=",".join(MODES), help="any of background,synchronous [both]")
    add("--every", type=int, default=4, help="steps from save to save [4]")
    add("--steps", type=int, default=16, help="timed steps [16]")
    add("--warmup", type=int, default=2, help="untimed steps before them [2]")
    add("--threads", type=int, default=0, help="CPU threads [all cores]")
    add("--folder", type=Path, help="write the checkpoints to this disk [temporary files]")
    add("--json", metavar="FILE", type=Path, help="also write the figures here")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.model = args.model or ("mid" if args.device == "cpu" else "internvl3-8b")
    modes = names_of(parser, "--modes", args.modes, MODES)
    if args.every < 2 or args.steps <= args.every or args.warmup < 0:
        parser.error("--every must be at least 2, --steps larger than it, and --warmup at least 0")
    if args.threads:
        torch.set_num_threads(args.threads)
    found = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        workload = repeated_workload(args, Path(folder))
        for mode in modes:
            found.append(measure(args, workload, mode, Path(folder)))
            print(format_row(args, found[-1]), flush=True)
    if args.json:
        dtype = default_dtype(args.device)
        write_report(
            args.json,
            args.device,
            arguments=vars(args) | {"dtype": dtype},
            rows=[asdict(row) for row in found],
        )
    return 0


def repeated_workload(args: argparse.Namespace, folder: Path) -> Workload:
    """Prepare one step's records, as often as there are steps."""
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
    """Train with checkpoints, written in one of the two ways."""
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
    seconds = [row["seconds"] for row in read_metrics(job)]
    return summarise(mode, seconds, args.every, args.warmup, folder_bytes(folder / "run"))


def summarise(mode: str, seconds: Sequence[float], every: int, warmup: int, size: int) -> Overhead:
    """Compare the steps after a save with all.

    Args:
        mode: one of `MODES`.
        seconds: of each step, from the end of the one before.
        every: steps from save to save.
        warmup: steps that do not count.
        size: of a checkpoint in bytes.
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
    """Return the size of the checkpoint in a run's folder."""
    return sum(file.stat().st_size for file in run.glob("checkpoint-*/**/*") if file.is_file())


def format_row(args: argparse.Namespace, row: Overhead) -> str:
    """Return the figures as a line of text."""
    after = statistics.median(row.after_save_seconds)
    verdict = "within" if row.ratio <= LIMIT else "over"
    return (
        f"{args.recipe} {args.model} {args.device}, {row.mode}: checkpoint {row.checkpoint_gb:.2f} GB, "
        f"median step {row.median_seconds:.2f} s, after a save {after:.2f} s ({row.ratio:.2f} times, "
        f"{verdict} {LIMIT}; worst {row.worst_ratio:.2f}), {row.seconds_a_save:+.2f} s a save"
    )


def _save_adapter(
    model: InternVLChatModel, folder: Path, weights: dict[str, torch.Tensor]
) -> dict[str, FileEntry]:
    return save_adapter(model, folder, BaseModel("random weights", "0" * 64), weights)


if __name__ == "__main__":
    sys.exit(main())
