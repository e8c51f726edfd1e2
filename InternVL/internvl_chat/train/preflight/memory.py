"""Memory plan: what a rank needs by component, and the parallel layout and activation checkpointing that fit.

All sizes are in bytes. Memory decides neither `--weight_precision` nor anything else that changes results.
"""

import dataclasses
import itertools
import resource
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import psutil
import torch

from internvl_chat.data.batching.sampler import StepSampler
from internvl_chat.data.dataset import SampleIndex, TrainingData
from internvl_chat.model.memory import PackSize, measure_activations, parallel_memory
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel
from internvl_chat.train.config import RunConfig, TrainConfig
from internvl_chat.train.optim.adamw import (
    OWN_OPTIMIZERS,
    WEIGHT_PRECISIONS,
    bytes_per_parameter,
    scratch_bytes,
)
from internvl_chat.train.optim.factory import uses_compiled_step
from internvl_chat.utils.distributed import all_gather_object
from internvl_chat.utils.errors import UsageError
from internvl_chat.utils.hardware import available_host_memory
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

# Share of a GPU's free memory that a plan may use; the allocator rounds up and fragments.
_USABLE = 0.95


@dataclass(frozen=True)
class MemoryPlan:
    """The plan of a run, the same on all ranks.

    Attributes:
        parallel: `single`, `ddp`, `fsdp` or `deepspeed`.
        checkpointed_layers: decoder layers with activation checkpointing, of `layers`.
        components, available: memory that a rank needs, by component, and may use.
        pack, sample_indices: the largest pack of any rank and step, and its records.
        several_packs: whether a step has several packs.
        fitting_flags: returns the flags whose planned total is at most a limit, each with that total.
    """

    parallel: str
    checkpointed_layers: int
    components: dict[str, float]
    available: float
    pack: PackSize
    sample_indices: list[SampleIndex]
    several_packs: bool
    layers: int
    fitting_flags: Callable[[float], dict[str, float]] = field(compare=False, repr=False)

    @property
    def total(self) -> float:
        """The planned peak; activations are freed before the optimizer needs its scratch."""
        sizes = dict(self.components)
        persistent = sum(sizes.pop(name) for name in ("weights", "gradients", "optimizer state"))
        return persistent + max(sizes.pop("optimizer scratch"), sum(sizes.values()))

    def table(self) -> str:
        """Return the plan as a block of text."""
        parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in self.components.items())
        return (
            f"memory plan in GB per rank ({self.parallel}, {self.checkpointed_layers} of {self.layers} "
            f"decoder layers checkpointed): {gigabytes(self.total)} of {gigabytes(self.available)}\n"
            f"  {parts}\n  largest pack: {self.pack.tokens} tokens ({self.pack.supervised} supervised), "
            f"{self.pack.tiles} tiles"
        )

    def explain_shortage(self, reason: str, limit: float) -> str:
        """Return the message of a run that does not fit, with the flags whose plan needs at most `limit`."""
        flags = [f"{flag} ({gigabytes(size)} GB)" for flag, size in self.fitting_flags(limit).items()]
        found = ", or ".join(flags) or "none of them alone; use more or larger GPUs, or LoRA"
        return f"{reason}\n{self.table()}\nflags that would fit: {found}"


def plan_memory(
    config: TrainConfig, model: InternVLChatModel, sampler: StepSampler, data: TrainingData
) -> MemoryPlan:
    """Choose the parallel layout and the checkpointed layers for the largest pack of the run; a collective.

    The model has its trained parameters chosen, and may be on any device.

    Raises:
        UsageError: the run does not fit; the message has the plan and the flags that would fit.
    """
    run, planner = config.run, _Planner(config, model, sampler, data)
    replicated = "ddp" if run.world_size > 1 else "single"
    plan = planner.plan(replicated if run.parallel in ("auto", "ddp") else run.parallel)
    if run.parallel == "auto" and run.world_size > 1:
        needs = f"ddp needs {gigabytes(plan.total)} of {gigabytes(plan.available)} GB per rank"
        if plan.total > plan.available:
            plan = planner.plan("fsdp")
        logger.info("--parallel auto: %s, because %s", plan.parallel, needs)
    if plan.total > plan.available:
        raise UsageError(plan.explain_shortage("the largest pack does not fit into memory", plan.available))
    logger.info("%s", plan.table())
    return plan


class _Planner:
    """Plans a run, also with one flag changed."""

    def __init__(
        self, config: TrainConfig, model: InternVLChatModel, sampler: StepSampler, data: TrainingData
    ) -> None:
        run, self.sampler, self.lengths = config.run, sampler, data.epoch_lengths()
        self.steps, self.checkpoint = run.count_steps(len(sampler)), config.model.grad_checkpoint
        self.precision = run.weight_precision if run.optim in OWN_OPTIMIZERS else "bf16"
        share = _USABLE if run.device.type == "cuda" else 1
        own = share * available_memory(run.device, run.local_world_size)
        self.available = min(all_gather_object(own))
        self.activations = measure_activations(model, run.device)
        self.packs = self.largest_packs(sampler.planner.max_packed_tokens)
        compiled = uses_compiled_step(self.precision, run.device)
        # Not when they are needed: sharding changes the parameters.
        keys = itertools.product(("single", "ddp", "fsdp", "deepspeed"), WEIGHT_PRECISIONS, (False, True))
        self.layouts = {key: layout_memory(model, run, *key, compiled) for key in keys}

    def plan(self, parallel: str, **changed: Any) -> MemoryPlan:
        """Return the plan with the fewest checkpointed layers that fits, or with the most.

        `precision`, `checkpoint` and `packs` may be changed.
        """
        packs, several = changed.get("packs", self.packs)
        layout = self.layouts[parallel, changed.get("precision", self.precision), several]
        checkpoint, layers = changed.get("checkpoint", self.checkpoint), self.activations.layers
        for count in {"True": [layers], "False": [0]}.get(checkpoint, range(layers + 1)):
            of_packs = [(self.activations.of(pack, count), pack, records) for pack, records in packs]
            of_pack, pack, records = max(of_packs, key=lambda one: sum(one[0].values()))
            plan = MemoryPlan(
                parallel, count, layout | of_pack, self.available, pack, records, several, layers,
                partial(self.fitting_flags, parallel),
            )  # fmt: skip
            if plan.total <= self.available:
                break
        return plan

    def fitting_flags(self, parallel: str, limit: float) -> dict[str, float]:
        """Change one flag at a time; return those whose planned total is at most `limit`, with that total."""
        totals = {}
        if parallel != "deepspeed":  # which does not take these flags
            totals["--parallel fsdp"] = self.plan("fsdp").total
            for name in WEIGHT_PRECISIONS:
                totals[f"--weight_precision {name}"] = self.plan(parallel, precision=name).total
        totals["--grad_checkpoint True"] = self.plan(parallel, checkpoint="True").total
        tokens, total = self.sampler.planner.max_packed_tokens or 0, limit + 1
        while total > limit and tokens > self.lengths.tokens.max():
            tokens //= 2
            total = self.plan(parallel, packs=self.largest_packs(tokens)).total
            totals[f"--max_packed_tokens {tokens}"] = total
        return {flag: total for flag, total in totals.items() if total <= limit}

    def largest_packs(
        self, max_packed_tokens: int | None
    ) -> tuple[list[tuple[PackSize, list[SampleIndex]]], bool]:
        """Return the packs of any step and rank that need most memory, and whether a step has several packs.

        There are two: the largest without activation checkpointing, and with it.
        """
        planner = dataclasses.replace(self.sampler.planner, max_packed_tokens=max_packed_tokens)
        tokens = self.lengths.tokens.astype(np.int64)
        columns = PackSize(tokens, self.lengths.supervised, self.lengths.tiles, tokens**2)
        counts = (0, self.activations.layers)
        needs = np.stack([sum(self.activations.of(columns, count).values()) for count in counts])
        largest, several = [(-1.0, [], 0)] * 2, False
        for step in range(1, self.steps + 1):
            epoch, number = self.sampler.position_of(step)
            ranks = planner(self.sampler.step(epoch, number))
            several = several or max(map(len, ranks)) > 1
            for pack in itertools.chain.from_iterable(ranks):
                found = [(needed, pack, epoch) for needed in needs[:, pack].sum(axis=1)]
                largest = [max(pair, key=lambda one: one[0]) for pair in zip(largest, found, strict=True)]
        return [
            (PackSize(*(int(c[pack].sum()) for c in columns)), [SampleIndex(int(i), epoch) for i in pack])
            for _, pack, epoch in largest
        ], several


def layout_memory(
    model: InternVLChatModel,
    run: RunConfig,
    parallel: str,
    precision: str,
    several_packs: bool,
    compiled: bool,
) -> dict[str, int]:
    """Return the memory of a layout by component, with the optimizer of the run; see `parallel_memory`."""
    trained = [p for p in model.parameters() if p.requires_grad]
    state = sum(p.numel() * (bytes_per_parameter(precision, p.dtype) - 2 * p.itemsize) for p in trained)
    scratch = scratch_bytes(precision, trained, "cuda" if run.device.type == "cuda" else "cpu", compiled)
    zero = (run.deepspeed or {}).get("zero_optimization", {})
    return parallel_memory(
        model,
        parallel,
        run.world_size,
        optimizer_state=state,
        optimizer_scratch=scratch,
        several_packs=several_packs,
        zero=zero,
    )


def available_memory(device: torch.device, local_ranks: int = 1) -> int:
    """Return the memory this process may use, including what it uses now: of its GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return available_host_memory() // local_ranks + psutil.Process().memory_info().rss


def max_memory(device: torch.device) -> int:
    """Return the peak memory so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def gigabytes(size: float) -> str:
    """Return a size in GB as text."""
    return f"{size / 1e9:.4g}"
