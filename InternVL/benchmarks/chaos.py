"""Kill a training run repeatedly and compare the result with an uninterrupted run.

The launcher trains a small model twice on the CPU with the same command. In the second run, a rank, the
launcher or all processes are killed with SIGKILL at random times, sometimes during a save. Before some
restarts, the newest checkpoint is corrupted. At the end, the ledgers, the losses of all steps and the weights
must be bit-identical.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil

from benchmarks.common import write_report

SOURCE_ROOT = Path(__file__).resolve().parents[1]
LAUNCHER = SOURCE_ROOT / "internvl_chat/shell/internvl3.0/2nd_finetune/M3LLM-fulldata-fullmodel.sh"
VICTIMS = ("process", "launcher", "all")
# Probability that a kill happens after a step instead of during startup, and the maximum number of steps
# before such a kill.
_LATE_PROBABILITY = 0.7
_MAX_STEPS_BEFORE_KILL = 8
# Maximum delay of a kill after a step, in step durations; covers another step and a save.
_STEPS_PER_SAVE = 3
# Probability that the newest checkpoint is corrupted before a restart.
_DAMAGE_PROBABILITY = 0.2


@dataclass
class Outcome:
    """Counts of the faults in the interrupted run, and its comparison with the uninterrupted run.

    Attributes:
        kills: number of kills.
        victims: type of victim -> number of kills.
        kills_while_saving: number of kills while a checkpoint was being written.
        kills_before_the_first_step: number of kills before the first step after a start.
        damaged: number of corrupted checkpoints.
        damaged_loaded: number of corrupted checkpoints from which the run resumed.
        starts: number of launcher starts.
        steps: number of training steps.
        steps_done_again: number of steps that were repeated after a kill.
        same_ledger: whether the ledgers are identical.
        same_losses: whether the losses of all steps are identical.
        same_weights: whether the final weights are identical.
        seconds: total duration of both runs.
    """

    kills: int = 0
    victims: dict[str, int] = field(default_factory=lambda: dict.fromkeys(VICTIMS, 0))
    kills_while_saving: int = 0
    kills_before_the_first_step: int = 0
    damaged: int = 0
    damaged_loaded: int = 0
    starts: int = 0
    steps: int = 0
    steps_done_again: int = 0
    same_ledger: bool = False
    same_losses: bool = False
    same_weights: bool = False
    seconds: float = 0.0

    @property
    def identical(self) -> bool:
        """Whether both runs are identical and no corrupted checkpoint was loaded."""
        return self.same_ledger and self.same_losses and self.same_weights and not self.damaged_loaded


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        prog="chaos.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="The exit code is 1 if anything differs.\n\n"
        "Example: python InternVL/benchmarks/chaos.py --kills 50 --json chaos.json",
    )
    add = parser.add_argument
    add("--kills", type=int, default=50, help="number of kills (default: 50)")
    add("--processes", type=int, default=2, help="world size (default: 2)")
    add("--steps", type=int, help="training steps (default: 8 per kill)")
    add("--save_steps", type=int, default=2, help="steps between checkpoints (default: 2)")
    add("--seed", type=int, default=0, help="random seed (default: 0)")
    add("--folder", type=Path, help="persistent working folder (default: temporary folder)")
    add("--json", metavar="FILE", type=Path, help="write the results as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line and return the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if min(args.kills, args.processes, args.save_steps) < 1:
        parser.error("--kills, --processes and --save_steps must be at least 1")
    args.steps = args.steps or 8 * args.kills
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        outcome = compare_runs(args, prepare(args, folder), folder)
    for name, value in asdict(outcome).items():
        print(f"{name:<28} {value}")
    if args.json:
        write_report(args.json, figures=asdict(outcome), arguments=vars(args))
    return 0 if outcome.identical else 1


@dataclass(frozen=True)
class Launch:
    """Command that starts a run.

    Attributes:
        command: launcher with its flags.
        environment: environment variables of the launcher.
    """

    command: list[str]
    environment: dict[str, str]

    def start(self, output: Path) -> subprocess.Popen:
        """Start or resume a run in the given output folder."""
        log = (output.parent / f"{output.name}.log").open("ab")
        with log:
            return subprocess.Popen(
                self.command, env=self.environment | {"OUTPUT_DIR": str(output)}, stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip


def prepare(args: argparse.Namespace, folder: Path) -> Launch:
    """Create sample data and a tiny model; return the command that trains the model."""
    own = os.environ | {"PYTHONPATH": str(SOURCE_ROOT), "CUDA_VISIBLE_DEVICES": ""}
    m3llm = [sys.executable, "-m", "internvl_chat.cli"]
    data, model = folder / "data", folder / "tiny"
    for command in (
        [*m3llm, "sample-data", str(data), "--train", "20", "--held-out", "1"],
        [*m3llm, "tiny-model", str(model), "--text", str(data / "train")],
    ):
        subprocess.run(command, env=own, check=True, stdout=subprocess.DEVNULL)
    environment = own | {
        "GPUS": "0",
        "NPROC": str(args.processes),
        "BATCH_SIZE": str(2 * args.processes),
        "MODEL_PATH": str(model),
        "META_PATH": str(data / "train.json"),
        "REPORT_TO": "none",
        "PYTHON": sys.executable,
        "M3LLM_CACHE": str(folder / "cache"),
    }
    flags = {
        "force_image_size": 112,
        "max_dynamic_patch": 1,
        "learning_rate": 1e-3,
        "max_steps": args.steps,
        "save_steps": args.save_steps,
        "save_total_limit": 3,
        "dataloader_num_workers": 1,
        "disable_tqdm": True,
    }
    tokens = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    return Launch(["bash", str(LAUNCHER), *tokens], environment)


def compare_runs(args: argparse.Namespace, launch: Launch, folder: Path) -> Outcome:
    """Train once without interruptions and once with kills, and compare the runs.

    Raises:
        RuntimeError: a run failed without a kill, ranks outlived their launcher, or the run finished before
            all kills.
    """
    began = time.monotonic()
    baseline, interrupted = folder / "baseline", folder / "interrupted"
    process = launch.start(baseline)
    first_step = _wait_for_step(process, baseline)
    if process.wait():
        raise RuntimeError(f"the uninterrupted run failed; see {baseline}.log")
    step = statistics.median(row["seconds"] for row in _rows(baseline))
    outcome, rng = Outcome(steps=args.steps), random.Random(args.seed)
    damaged: set[tuple[int, int]] = set()
    while True:
        if outcome.kills and rng.random() < _DAMAGE_PROBABILITY:
            outcome.damaged += _damage_newest(interrupted, rng, damaged)
        corrupted = {path.name for path in _checkpoints(interrupted) if _identity(path) in damaged}
        done, kept = _last_step(interrupted), _newest_step(interrupted, corrupted)
        outcome.steps_done_again += done - kept
        logged = len(_lines(interrupted / "training_log.txt"))
        process = launch.start(interrupted)
        outcome.starts += 1
        if outcome.kills < args.kills:
            killed = _wait_to_kill(process, interrupted, first_step, step, kept, rng)
            if killed:
                _kill(process, interrupted, kept, rng, outcome)
        else:
            killed = False
        code = process.wait()
        _wait_for_all_to_end(interrupted)
        outcome.damaged_loaded += resumed_from(interrupted, logged) in corrupted
        if (interrupted / "train_results.json").is_file():
            break
        if not killed:
            raise RuntimeError(
                f"the launcher failed with exit code {code} without being killed; see {interrupted}.log"
            )
    if outcome.kills < args.kills:
        raise RuntimeError(f"the run finished after {outcome.kills} of {args.kills} kills; increase --steps")
    outcome.same_ledger = _lines(baseline / "ledger.jsonl") == _lines(interrupted / "ledger.jsonl")
    outcome.same_losses = _losses(baseline) == _losses(interrupted)
    outcome.same_weights = _weights(baseline) == _weights(interrupted)
    outcome.seconds = round(time.monotonic() - began, 1)
    return outcome


def _wait_to_kill(
    process: subprocess.Popen, output: Path, first_step: float, step: float, kept: int, rng: random.Random
) -> bool:
    """Wait until a random time during startup or after some steps; return whether the run is still alive.

    Args:
        process: launcher process.
        output: output folder of the run.
        first_step: seconds from the start of the launcher to the end of the first step.
        step: seconds per step.
        kept: step of the newest valid checkpoint.
        rng: random number generator.
    """
    until, steps = rng.uniform(0.1, first_step), 0
    if rng.random() < _LATE_PROBABILITY:
        until, steps = 20 * first_step, rng.randint(1, _MAX_STEPS_BEFORE_KILL)
    began = time.monotonic()
    while time.monotonic() - began < until and not (steps and _last_step(output) >= kept + steps):
        if process.poll() is not None:
            return False
        time.sleep(0.005)
    time.sleep(rng.uniform(0, _STEPS_PER_SAVE * step))
    return process.poll() is None


def _kill(process: subprocess.Popen, output: Path, kept: int, rng: random.Random, outcome: Outcome) -> None:
    """Kill a random rank, the launcher or all processes, and record the kill in `outcome`."""
    saving = any((output / ".partial").glob("checkpoint-*"))
    stepping = _last_step(output) > kept
    victim = rng.choice(VICTIMS)
    ranks = _ranks(output)
    if victim == "process" and ranks:
        chosen = [rng.choice(ranks)]
    elif victim == "launcher":
        chosen = [psutil.Process(process.pid)]
    else:
        victim, chosen = (
            "all",
            [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)],
        )
    for process in chosen:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    outcome.kills += 1
    outcome.victims[victim] += 1
    outcome.kills_while_saving += saving
    outcome.kills_before_the_first_step += not stepping


def _ranks(output: Path) -> list[psutil.Process]:
    """Return the processes of all ranks of a run, even if the launcher is dead."""
    ranks = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        is_training = any(word.endswith("train/internvl_chat_finetune.py") for word in words)
        # The torchrun wrapper has the same arguments.
        if str(output) in words and is_training and "internvl_chat.train.distributed.launch" not in words:
            ranks.append(process)
    return ranks


def _wait_for_all_to_end(output: Path, seconds: float = 60.0) -> None:
    """Wait until all ranks have ended. If their launcher was killed, they save and exit on their own.

    Raises:
        RuntimeError: ranks are still running after `seconds`.
    """
    _, alive = psutil.wait_procs(_ranks(output), timeout=seconds)
    if alive:
        raise RuntimeError(f"{len(alive)} ranks are still running without their launcher")


def _wait_for_step(process: subprocess.Popen, output: Path) -> float:
    """Wait for the end of the first step and return the seconds waited."""
    began = time.monotonic()
    while process.poll() is None and not _last_step(output):
        time.sleep(0.05)
    return time.monotonic() - began


def _damage_newest(output: Path, rng: random.Random, damaged: set[tuple[int, int]]) -> bool:
    """Corrupt or truncate a file of the newest checkpoint; return whether this was done.

    The newest checkpoint is not damaged if it is the only one or has been damaged before.
    """
    checkpoints = sorted(_checkpoints(output), key=_step_of)
    if len(checkpoints) < 2 or _identity(checkpoints[-1]) in damaged:
        return False
    files = sorted(path for path in checkpoints[-1].rglob("*") if path.is_file() and path.stat().st_size)
    file = rng.choice(files)
    content = bytearray(file.read_bytes())
    position = rng.randrange(len(content))
    if rng.random() < 0.5:
        content[position] ^= 1 << rng.randrange(8)
    else:
        del content[position:]
    file.write_bytes(content)
    damaged.add(_identity(checkpoints[-1]))
    return True


def _identity(folder: Path) -> tuple[int, int]:
    """Return the inode and modification time of a folder, because its name or inode alone may be reused."""
    state = folder.stat()
    return state.st_ino, state.st_mtime_ns


def _checkpoints(output: Path) -> list[Path]:
    return list(output.glob("checkpoint-*"))


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _newest_step(output: Path, excluded: set[str]) -> int:
    return max((_step_of(path) for path in _checkpoints(output) if path.name not in excluded), default=0)


def resumed_from(output: Path, logged: int) -> str | None:
    """Return the name of the checkpoint from which the last start resumed, or None.

    Args:
        output: output folder of the run.
        logged: number of log lines before that start.
    """
    started = "\n".join(_lines(output / "training_log.txt")[logged:])
    found = re.findall(r" INFO resuming from .*/(checkpoint-\d+)$", started, re.MULTILINE)
    return found[-1] if found else None


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []


def _rows(output: Path) -> list[dict]:
    rows = []
    for line in _lines(output / "metrics.jsonl"):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # truncated by a kill
    return rows


def _last_step(output: Path) -> int:
    return max((row["step"] for row in _rows(output)), default=0)


def _losses(output: Path) -> list[tuple]:
    return [(row["step"], row["loss"], row["grad_norm"], row["learning_rate"]) for row in _rows(output)]


def _weights(output: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in output.glob("*.safetensors")}


if __name__ == "__main__":
    sys.exit(main())
