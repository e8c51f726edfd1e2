"""A measurement: its order, its clock and its result; each runs in a process of its own."""

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

from benchmarks.recipes import RECIPES, Recipe
from benchmarks.shapes import DTYPES, SHAPES, Shape, weightless_model
from benchmarks.workload import Workload
from internvl_chat.model.flops import count_flops, peak_flops
from internvl_chat.train.freeze import set_trainable


@dataclass(frozen=True)
class Job:
    """What to measure.

    Attributes:
        preset: `reference`, `fast` or `peer`.
        label: what the table calls it.
        recipe: `lora` or `full`.
        model: a key of `SHAPES`.
        device: `cpu` or `cuda`.
        workload: file of the prepared records, as many as all steps need.
        folder: for whatever the preset writes.
        warmup: untimed steps.
        steps: timed steps.
        threads: of the CPU; 0 for all cores.
        flags: of the training command, for `fast`.
        variant: of `fast`, a key of `ABLATIONS`.
        dtype: of weights and activations, a key of `DTYPES`.
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
        """The recipe."""
        return RECIPES[self.recipe]

    @property
    def shape(self) -> Shape:
        """The model's shape."""
        return SHAPES[self.model]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of weights and activations."""
        return DTYPES[self.dtype]

    @property
    def bf16(self) -> bool:
        """Whether to train in bfloat16."""
        return self.torch_dtype == torch.bfloat16

    @property
    def total_steps(self) -> int:
        """Steps, the untimed included."""
        return self.warmup + self.steps


@dataclass(frozen=True)
class Steps:
    """What a preset reports of its steps.

    Attributes:
        tokens: of each step, as the preset counted them.
        losses: of each step.
    """

    tokens: list[int]
    losses: list[float]


@dataclass(frozen=True)
class Result:
    """What was measured.

    Attributes:
        seconds: of the timed steps.
        records: in them.
        tokens: in them.
        flops: of them, without recomputation.
        peak_flops: of the device, or None.
        peak_memory: bytes.
        first_loss: of the first step.
    """

    seconds: float
    records: int
    tokens: int
    flops: float
    peak_flops: float | None
    peak_memory: int
    first_loss: float


class Clock(TrainerCallback):
    """Stamps the start and the end of every step; as a callback, in transformers' Trainer."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stamps: list[float] = []

    def tick(self) -> None:
        """Note the time when all work so far is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.stamps.append(time.perf_counter())

    def seconds(self, warmup: int) -> float:
        """Return the time of all steps but the first `warmup`."""
        return self.stamps[-1] - self.stamps[warmup]

    def on_step_begin(self, *_: object, **__: object) -> None:
        """Called by the Trainer before a step's first forward pass."""
        if not self.stamps:
            self.tick()

    def on_step_end(self, *_: object, **__: object) -> None:
        """Called by the Trainer when the weights are updated."""
        self.tick()


def result_of(job: Job, workload: Workload, clock: Clock, steps: Steps) -> Result:
    """Put the measurement of this process together."""
    size = job.settings.step_records
    timed = workload.sizes[job.warmup * size : job.total_steps * size]
    model = weightless_model(job.shape)
    adapters = job.settings.lora_rank
    model.config.use_llm_lora = adapters
    set_trainable(model, freeze_llm=adapters > 0, freeze_mlp=adapters > 0, freeze_backbone=True)
    counter = count_flops(model)
    return Result(
        seconds=clock.seconds(job.warmup),
        records=len(timed),
        tokens=sum(steps.tokens[job.warmup :]),
        flops=sum(counter.step([s.tokens], s.supervised, s.tiles) for s in timed),
        peak_flops=peak_flops(clock.device),
        peak_memory=peak_memory(clock.device),
        first_loss=steps.losses[0],
    )


def peak_memory(device: torch.device) -> int:
    """Return the most bytes used so far: of the GPU's allocations, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():
        # ru_maxrss would begin with what the process that started this one had used.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_in_a_process(job: Job, script: Path, number: int) -> Result:
    """Measure in a process of its own, so that the peak memory is this job's alone.

    Raises:
        RuntimeError: it failed; with the end of its output.
    """
    folder = Path(job.folder) / f"job{number}"
    folder.mkdir()
    order, answer, log = folder / "job.json", folder / "result.json", folder / "log.txt"
    job = dataclasses.replace(job, folder=str(folder))
    order.write_text(json.dumps(dataclasses.asdict(job)), encoding="utf-8")
    with log.open("w", encoding="utf-8") as stream:
        code = subprocess.run(
            [sys.executable, str(script), "--child", str(order)],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=os.environ | _environment(job),
        ).returncode
    if code or not answer.is_file():
        end = log.read_text(encoding="utf-8", errors="replace")[-3000:]
        raise RuntimeError(f"{job.label} ended with exit code {code}:\n{end}")
    return Result(**json.loads(answer.read_text(encoding="utf-8")))


def _environment(job: Job) -> dict[str, str]:
    """Return what the launchers set, too."""
    # The records lie in a temporary folder, and so do their lengths.
    variables = {"TOKENIZERS_PARALLELISM": "false", "M3LLM_CACHE": job.folder}
    if job.device == "cpu":
        variables["CUDA_VISIBLE_DEVICES"] = ""
        variables["OMP_NUM_THREADS"] = str(job.threads or os.cpu_count() or 1)
    return variables


def read_job(order: Path) -> Job:
    """Read the order of a child process."""
    raw = json.loads(order.read_text(encoding="utf-8"))
    return Job(**{**raw, "flags": tuple(raw["flags"])})


def write_result(order: Path, result: Result) -> None:
    """Write the answer of a child process beside its order."""
    (order.parent / "result.json").write_text(json.dumps(dataclasses.asdict(result)), encoding="utf-8")
