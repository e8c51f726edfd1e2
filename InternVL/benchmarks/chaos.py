"""Kill a run again and again, and compare what comes out with a run that nobody disturbed.

A small model is trained twice on the CPU by the launcher, with the same command. The second run is ended with
SIGKILL at random moments, sometimes while it saves: one of its processes, the launcher's, or all of them; and
now and then its newest checkpoint is damaged before it starts again. At the end the ledgers, the losses of
all steps and the weights must be the same, bit for bit.
"""

import argparse
import hashlib
import json
import os
import random
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

from benchmarks.report import write_report

SOURCE_ROOT = Path(__file__).resolve().parents[1]
LAUNCHER = SOURCE_ROOT / "internvl_chat/shell/internvl3.0/2nd_finetune/M3LLM-fulldata-fullmodel.sh"
VICTIMS = ("process", "launcher", "all")
# Share of the kills that come after a step, and the most steps before them.
_LATE_SHARE = 0.7
_MOST_STEPS = 8
# The time of so many steps is enough for a step and a save.
_STEPS_AND_A_SAVE = 3
# Share of the restarts before which the newest of several checkpoints is damaged.
_DAMAGE_SHARE = 0.2


@dataclass
class Figures:
    """What happened, and whether it left a trace.

    Attributes:
        kills: SIGKILLs sent to a run at work.
        victims: how many of each kind.
        kills_while_saving: with a checkpoint in the making.
        kills_before_the_first_step: of a start.
        damaged: checkpoints damaged on purpose.
        damaged_loaded: of them, how many a run resumed from.
        starts: of the program.
        steps: of the run.
        steps_done_again: lost to kills.
        same_ledger: as that of the undisturbed run.
        same_losses: of all steps.
        same_weights: at the end.
        seconds: of all.
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
    def unharmed(self) -> bool:
        """True if nothing of it all can be seen."""
        return self.same_ledger and self.same_losses and self.same_weights and not self.damaged_loaded


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="chaos.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="The exit code is 1 if anything differs.\n\n"
        "Example: python InternVL/benchmarks/chaos.py --kills 50 --json chaos.json",
    )
    add = parser.add_argument
    add("--kills", type=int, default=50, help="how often the run is killed [50]")
    add("--processes", type=int, default=2, help="of the run [2]")
    add("--steps", type=int, help="of the run [8 a kill]")
    add("--save_steps", type=int, default=2, help="steps from checkpoint to checkpoint [2]")
    add("--seed", type=int, default=0, help="of the moments [0]")
    add("--folder", type=Path, help="work here and keep all [temporary files]")
    add("--json", metavar="FILE", type=Path, help="also write the figures here")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if min(args.kills, args.processes, args.save_steps) < 1:
        parser.error("--kills, --processes and --save_steps must be at least 1")
    args.steps = args.steps or 8 * args.kills
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        figures = disturb(args, prepare(args, folder), folder)
    for name, value in asdict(figures).items():
        print(f"{name:<28} {value}")
    if args.json:
        write_report(args.json, figures=asdict(figures), arguments=vars(args))
    return 0 if figures.unharmed else 1


@dataclass(frozen=True)
class Run:
    """A way to start the training; its output folder decides which run it is.

    Attributes:
        command: of the launcher, with flags.
        environment: of the launcher.
    """

    command: list[str]
    environment: dict[str, str]

    def start(self, output: Path) -> subprocess.Popen:
        """Begin, or go on from the newest checkpoint."""
        log = (output.parent / f"{output.name}.log").open("ab")
        with log:
            return subprocess.Popen(
                self.command, env=self.environment | {"OUTPUT_DIR": str(output)}, stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip


def prepare(args: argparse.Namespace, folder: Path) -> Run:
    """Make data and a model, and return how to train."""
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
    return Run(["bash", str(LAUNCHER), *tokens], environment)


def disturb(args: argparse.Namespace, run: Run, folder: Path) -> Figures:
    """Train undisturbed, then disturbed, and compare."""
    began = time.monotonic()
    calm, chaos = folder / "calm", folder / "chaos"
    process = run.start(calm)
    first_step = _wait_for_step(process, calm)
    if process.wait():
        raise RuntimeError(f"the undisturbed run failed; see {calm}.log")
    step = statistics.median(row["seconds"] for row in _rows(calm))
    figures, rng = Figures(steps=args.steps), random.Random(args.seed)
    damaged: set[tuple[int, int]] = set()
    while True:
        if figures.kills and rng.random() < _DAMAGE_SHARE:
            figures.damaged += _damage_newest(chaos, rng, damaged)
        bad = {path.name for path in _checkpoints(chaos) if _identity(path) in damaged}
        done, kept = _last_step(chaos), _newest_step(chaos, bad)
        figures.steps_done_again += done - kept
        logged = len(_lines(chaos / "training_log.txt"))
        process = run.start(chaos)
        figures.starts += 1
        if figures.kills < args.kills:
            killed = _wait_for_moment(process, chaos, first_step, step, kept, rng)
            if killed:
                _kill(process, chaos, kept, rng, figures)
        else:
            killed = False
        code = process.wait()
        _wait_for_all_to_end(chaos)
        figures.damaged_loaded += _resumed_from(chaos, logged) in bad
        if (chaos / "train_results.json").is_file():
            break
        if not killed:
            raise RuntimeError(f"a start that nobody disturbed failed with exit code {code}; see {chaos}.log")
    if figures.kills < args.kills:
        raise RuntimeError(f"the run was finished after {figures.kills} kills; give it more --steps")
    figures.same_ledger = _lines(calm / "ledger.jsonl") == _lines(chaos / "ledger.jsonl")
    figures.same_losses = _losses(calm) == _losses(chaos)
    figures.same_weights = _weights(calm) == _weights(chaos)
    figures.seconds = round(time.monotonic() - began, 1)
    return figures


def _wait_for_moment(
    process: subprocess.Popen, output: Path, first_step: float, step: float, kept: int, rng: random.Random
) -> bool:
    """Wait for a random moment, while it starts or after some steps; returns whether it still runs then.

    Args:
        process: the launcher.
        output: the run's folder.
        first_step: seconds from its start to its first step.
        step: seconds that a step takes.
        kept: steps that are done for good.
        rng: of the moments.
    """
    until, steps = rng.uniform(0.1, first_step), 0
    if rng.random() < _LATE_SHARE:
        until, steps = 20 * first_step, rng.randint(1, _MOST_STEPS)
    began = time.monotonic()
    while time.monotonic() - began < until and not (steps and _last_step(output) >= kept + steps):
        if process.poll() is not None:
            return False
        time.sleep(0.005)
    time.sleep(rng.uniform(0, _STEPS_AND_A_SAVE * step))
    return process.poll() is None


def _kill(process: subprocess.Popen, output: Path, kept: int, rng: random.Random, figures: Figures) -> None:
    """End one process of a run, its launcher, or all."""
    saving = any((output / ".partial").glob("checkpoint-*"))
    stepping = _last_step(output) > kept
    victim = rng.choice(VICTIMS)
    trainers = _trainers(output)
    if victim == "process" and trainers:
        chosen = [rng.choice(trainers)]
    elif victim == "launcher":
        chosen = [psutil.Process(process.pid)]
    else:
        victim, chosen = (
            "all",
            [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)],
        )
    for one in chosen:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    figures.kills += 1
    figures.victims[victim] += 1
    figures.kills_while_saving += saving
    figures.kills_before_the_first_step += not stepping


def _trainers(output: Path) -> list[psutil.Process]:
    """Return the processes that train into a folder, whoever their parents are now."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        is_training = any(word.endswith("train/internvl_chat_finetune.py") for word in words)
        # The process that writes the log has the launcher's command line.
        if str(output) in words and is_training and "internvl_chat.train.distributed.launch" not in words:
            found.append(process)
    return found


def _wait_for_all_to_end(output: Path, seconds: float = 60.0) -> None:
    """Wait until nobody works on a folder: what has lost its launcher saves, and ends by itself."""
    _, alive = psutil.wait_procs(_trainers(output), timeout=seconds)
    if alive:
        raise RuntimeError(f"{len(alive)} processes go on without their launcher")


def _wait_for_step(process: subprocess.Popen, output: Path) -> float:
    """Return how many seconds a run takes from its start to the end of its first step."""
    began = time.monotonic()
    while process.poll() is None and not _last_step(output):
        time.sleep(0.05)
    return time.monotonic() - began


def _damage_newest(output: Path, rng: random.Random, damaged: set[tuple[int, int]]) -> bool:
    """Change or cut a file of the newest checkpoint, if there is another; returns whether it was done."""
    checkpoints = sorted(_checkpoints(output), key=_step_of)
    if len(checkpoints) < 2 or _identity(checkpoints[-1]) in damaged:
        return False
    files = sorted(path for path in checkpoints[-1].rglob("*") if path.is_file() and path.stat().st_size)
    file = rng.choice(files)
    content = bytearray(file.read_bytes())
    place = rng.randrange(len(content))
    if rng.random() < 0.5:
        content[place] ^= 1 << rng.randrange(8)
    else:
        del content[place:]
    file.write_bytes(content)
    damaged.add(_identity(checkpoints[-1]))
    return True


def _identity(folder: Path) -> tuple[int, int]:
    """Return what no other checkpoint has: names come again, and so do the numbers of deleted folders."""
    state = folder.stat()
    return state.st_ino, state.st_mtime_ns


def _checkpoints(output: Path) -> list[Path]:
    return list(output.glob("checkpoint-*"))


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _newest_step(output: Path, bad: set[str]) -> int:
    return max((_step_of(path) for path in _checkpoints(output) if path.name not in bad), default=0)


def _resumed_from(output: Path, logged: int) -> str | None:
    """Return the name of the checkpoint that a start went on from, by the log's lines after the first."""
    found = [line for line in _lines(output / "training_log.txt")[logged:] if " resuming from " in line]
    return Path(found[-1].rpartition(" ")[2]).name if found else None


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []


def _rows(output: Path) -> list[dict]:
    rows = []
    for line in _lines(output / "metrics.jsonl"):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # a line that a kill cut short
    return rows


def _last_step(output: Path) -> int:
    return max((row["step"] for row in _rows(output)), default=0)


def _losses(output: Path) -> list[tuple]:
    return [(row["step"], row["loss"], row["grad_norm"], row["learning_rate"]) for row in _rows(output)]


def _weights(output: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in output.glob("*.safetensors")}


if __name__ == "__main__":
    sys.exit(main())
