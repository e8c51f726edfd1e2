"""Benchmark jobs: measurements that run in a subprocess, with their settings, clock and result."""

import dataclasses
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import TrainerCallback

from benchmarks.presets.recipes import RECIPES, Recipe
from benchmarks.shapes import DTYPES, SHAPES, Shape, weightless_model
from benchmarks.workload import Workload
from internvl_chat.model.flops import count_flops, peak_flops
from internvl_chat.train.freeze import set_trainable


@dataclass(frozen=True)
class Job:
    """Settings of a measurement.

    Attributes:
        preset: implementation to measure: `reference`, `fast` or `peer`.
        label: name of the job in the table.
        recipe: `lora` or `full`.
        model: key of `SHAPES`.
        device: `cpu` or `cuda`.
        workload: JSON file of the prepared workload.
        folder: working folder.
        warmup: number of untimed steps.
        steps: number of timed steps.
        threads: CPU threads; 0 for all cores.
        flags: additional flags of the training script (`fast` only).
        variant: ablation of `fast`, a key of `ABLATIONS`; None for no ablation.
        dtype: dtype of the weights and activations, a key of `DTYPES`.
    """

    preset: str
    label: str
    recipe: str
    model: str
    device: str
    workload: str
    folder: str
    warmup: int
    steps: int
    threads: int = 0
    flags: tuple[str, ...] = ()
    variant: str | None = None
    dtype: str = "bfloat16"

    @property
    def settings(self) -> Recipe:
        """Settings of the recipe."""
        return RECIPES[self.recipe]

    @property
    def shape(self) -> Shape:
        """Shape of the model."""
        return SHAPES[self.model]

    @property
    def torch_dtype(self) -> torch.dtype:
        """Dtype of the weights and activations."""
        return DTYPES[self.dtype]

    @property
    def bf16(self) -> bool:
        """Whether the job trains in bfloat16."""
        return self.torch_dtype == torch.bfloat16

    @property
    def total_steps(self) -> int:
        """Number of steps, including the warm-up."""
        return self.warmup + self.steps


@dataclass(frozen=True)
class Steps:
    """Tokens and losses of the steps of a job.

    Attributes:
        tokens: tokens of each step, counted by the preset.
        losses: loss of each step, averaged over its records or, in the peer preset, its supervised tokens.
        first_token_loss: loss of the first step, averaged over its supervised tokens; None if not computed.
    """

    tokens: list[int]
    losses: list[float]
    first_token_loss: float | None = None


@dataclass(frozen=True)
class Result:
    """Result of a measurement.

    Attributes:
        seconds: total duration of the timed steps.
        records: number of records in the timed steps.
        tokens: number of tokens in the timed steps.
        flops: FLOPs of the timed steps, without recomputation for activation checkpointing.
        peak_flops: peak FLOP/s of the device, or None if unknown.
        peak_memory: peak memory in bytes.
        first_loss: loss of the first step.
        first_token_loss: see `Steps`.
    """

    seconds: float
    records: int
    tokens: int
    flops: float
    peak_flops: float | None
    peak_memory: int
    first_loss: float
    first_token_loss: float | None = None


class Clock(TrainerCallback):
    """Records the start of the first step and the end of each step; can be used as a Trainer callback."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stamps: list[float] = []

    def tick(self) -> None:
        """Synchronize the device and record the time."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.stamps.append(time.perf_counter())

    def seconds(self, warmup: int) -> float:
        """Return the total duration of the steps that follow the first `warmup` steps."""
        return self.stamps[-1] - self.stamps[warmup]

    def on_step_begin(self, *_: object, **__: object) -> None:
        """Called by the Trainer before the first forward pass of a step."""
        if not self.stamps:
            self.tick()

    def on_step_end(self, *_: object, **__: object) -> None:
        """Called by the Trainer after the weight update."""
        self.tick()


def result_of(job: Job, workload: Workload, clock: Clock, steps: Steps) -> Result:
    """Return the result of a job that has finished in this process."""
    size = job.settings.step_records
    timed = workload.sizes[job.warmup * size : job.total_steps * size]
    model = weightless_model(job.shape)
    rank = job.settings.lora_rank
    model.config.use_llm_lora = rank
    set_trainable(model, freeze_llm=rank > 0, freeze_mlp=rank > 0, freeze_backbone=True)
    counter = count_flops(model)
    return Result(
        seconds=clock.seconds(job.warmup),
        records=len(timed),
        tokens=sum(steps.tokens[job.warmup :]),
        flops=sum(counter.step([s.tokens], s.supervised, s.tiles) for s in timed),
        peak_flops=peak_flops(clock.device),
        peak_memory=peak_memory(clock.device),
        first_loss=steps.losses[0],
        first_token_loss=steps.first_token_loss,
    )


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: allocated by torch on a GPU, or resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():
        # Use VmHWM, because ru_maxrss includes the memory of the parent process before exec.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_in_subprocess(job: Job, script: Path, number: int) -> Result:
    """Run a job in a subprocess, so that its peak memory is measured separately; return its result.

    Args:
        job: job to run.
        script: script that runs a job file passed with `--child`.
        number: number that makes the folder name unique.

    Raises:
        RuntimeError: the job failed; the message contains the end of its output.
    """
    folder = Path(job.folder) / f"job{number}"
    folder.mkdir()
    job_file, result_file, log = folder / "job.json", folder / "result.json", folder / "log.txt"
    job = dataclasses.replace(job, folder=str(folder))
    job_file.write_text(json.dumps(dataclasses.asdict(job)), encoding="utf-8")
    with log.open("w", encoding="utf-8") as stream:
        code = subprocess.run(
            [sys.executable, str(script), "--child", str(job_file)],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=os.environ | _environment(job),
        ).returncode
    if code or not result_file.is_file():
        end = log.read_text(encoding="utf-8", errors="replace")[-3000:]
        raise RuntimeError(f"{job.label} failed with exit code {code}:\n{end}")
    return Result(**json.loads(result_file.read_text(encoding="utf-8")))


def _environment(job: Job) -> dict[str, str]:
    """Return the environment variables of the subprocess: those of the launchers, and a temporary cache."""
    variables = {"TOKENIZERS_PARALLELISM": "false", "M3LLM_CACHE": job.folder}
    if job.device == "cpu":
        variables["CUDA_VISIBLE_DEVICES"] = ""
        variables["OMP_NUM_THREADS"] = str(job.threads or os.cpu_count() or 1)
    return variables


def read_job(file: Path) -> Job:
    """Read the job of a subprocess."""
    raw = json.loads(file.read_text(encoding="utf-8"))
    return Job(**{**raw, "flags": tuple(raw["flags"])})


def write_result(job_file: Path, result: Result) -> None:
    """Write the result of a subprocess next to its job file."""
    (job_file.parent / "result.json").write_text(json.dumps(dataclasses.asdict(result)), encoding="utf-8")
