"""Memory plan: estimate each rank's memory and choose the parallel layout and activation checkpointing.

All sizes are in bytes. The plan never changes flags that affect the results, such as `--weight_precision`.
"""

import dataclasses
import functools
import itertools
import math
import resource
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import psutil
import torch

from internvl_chat.constants import WEIGHT_PRECISIONS
from internvl_chat.data.batching.sampler import StepSampler
from internvl_chat.data.dataset import SampleIndex, TrainingData
from internvl_chat.data.index.cache import Lengths
from internvl_chat.model.lora.quantization import quantization_bytes
from internvl_chat.model.memory import (
    COMPONENTS,
    Activations,
    PackSize,
    measure_activations,
    offloaded_memory,
    parallel_memory,
    saves_linear_inputs,
)
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel
from internvl_chat.train.config import RunConfig, TrainConfig
from internvl_chat.train.optim.adamw import OWN_OPTIMIZERS, scratch_bytes
from internvl_chat.train.optim.factory import has_quantized_state, state_bytes, uses_compiled_step
from internvl_chat.utils.distributed import all_gather_object
from internvl_chat.utils.errors import UsageError
from internvl_chat.utils.hardware import available_host_memory
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

# Usable fraction of a GPU's free memory; the rest allows for rounding and fragmentation in the allocator.
USABLE = 0.95
_CPU = torch.device("cpu")
_LAYOUTS = ("single", "ddp", "fsdp", "hsdp", "deepspeed")

# The largest packs with their records, and whether any rank has multiple packs in a step.
LargestPacks = tuple[list[tuple[PackSize, list[SampleIndex]]], bool]


@dataclass(frozen=True)
class MemoryPlan:
    """Memory plan of a run, identical on all ranks.

    Attributes:
        parallel: `single`, `ddp`, `fsdp`, `hsdp` or `deepspeed`.
        checkpointed_layers: number of decoder layers with activation checkpointing.
        components: memory required per rank, keyed by component.
        available: memory available per rank.
        pack: size of the largest pack across all ranks and steps.
        sample_indices: records of the largest pack.
        several_packs: whether any rank has multiple packs in a step.
        layers: number of decoder layers.
        host: host memory required per rank for offloaded state.
        host_available: host memory available per rank.
        fitting_flags: function that takes a memory limit and returns each flag that would by itself make the
            run fit, with the planned total.
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
    host: float = 0
    host_available: float = math.inf

    @property
    def total(self) -> float:
        """Planned peak memory. Activations are freed before the optimizer allocates its scratch memory."""
        sizes = dict(self.components)
        persistent = sum(sizes.pop(name) for name in ("weights", "gradients", "optimizer state"))
        return persistent + max(sizes.pop("optimizer scratch"), sum(sizes.values()))

    def parts(self) -> tuple[float, float, float, float, float]:
        """Return the bytes of weights, gradients, optimizer (state and scratch), buffers, and activations."""
        sizes = dict(self.components)
        weights, gradients, state, scratch, buffers = (sizes.pop(name) for name in COMPONENTS)
        return weights, gradients, state + scratch, buffers, sum(sizes.values())

    def table(self) -> str:
        """Format the plan as text."""
        parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in self.components.items())
        host = (
            f"; host memory: {gigabytes(self.host)} of {gigabytes(self.host_available)}" if self.host else ""
        )
        return (
            f"memory plan in GB per rank ({self.parallel}, {self.checkpointed_layers} of {self.layers} "
            f"decoder layers checkpointed): {gigabytes(self.total)} of {gigabytes(self.available)}{host}\n"
            f"  {parts}\n  largest pack: {self.pack.tokens} tokens ({self.pack.supervised} supervised), "
            f"{self.pack.tiles} tiles"
        )

    def explain_shortage(self, reason: str, limit: float) -> str:
        """Return an error message with the plan and the flags that would make the run fit within `limit`."""
        flags = [f"{flag} ({gigabytes(size)} GB)" for flag, size in self.fitting_flags(limit).items()]
        options = ", or ".join(flags) or "no single flag; use more or larger GPUs, LoRA or QLoRA"
        return f"{reason}\n{self.table()}\nflags that would fit: {options}"


def plan_memory(
    config: TrainConfig, model: InternVLChatModel, sampler: StepSampler, data: TrainingData
) -> MemoryPlan:
    """Choose the parallel layout and activation checkpointing for the largest pack of the run.

    Collective: call on all ranks.

    Args:
        model: model on any device, after `set_trainable`.

    Raises:
        UsageError: the run does not fit; the message contains the plan and the flags that would fit.
    """
    run = config.run
    node_sizes = set(all_gather_object(run.local_world_size))
    planner = MemoryPlanner(
        config,
        model,
        sampler,
        data.epoch_lengths(),
        available=min(all_gather_object(usable_memory(run))),
        activations=measure_activations(
            model, run.device, linear_inputs=saves_linear_inputs(zero_section(run))
        ),
        compiled=uses_compiled_step(update_precision(run), run.device),
        host_available=min(all_gather_object(available_memory(_CPU, run.local_world_size))),
        can_replicate=len(node_sizes) == 1 and 1 < run.local_world_size < run.world_size,
    )
    planner.compute_layouts()
    replicated = "ddp" if run.world_size > 1 else "single"
    plan = planner.plan(replicated if run.parallel in ("auto", "ddp") else run.parallel)
    if run.parallel == "auto" and run.world_size > 1:
        needs = f"ddp needs {gigabytes(plan.total)} of {gigabytes(plan.available)} GB per rank"
        layouts = ("hsdp", "fsdp") if planner.can_replicate else ("fsdp",)  # HSDP sends less between nodes
        for sharded in layouts if planner.can_shard else ():
            if plan.total > plan.available:
                plan = planner.plan(sharded)
        logger.info("--parallel auto: %s, because %s", plan.parallel, needs)
    if plan.total > plan.available:
        raise UsageError(plan.explain_shortage("the largest pack does not fit in memory", plan.available))
    if plan.host > plan.host_available:
        raise UsageError(
            f"the offloaded state needs {gigabytes(plan.host)} GB of host memory per rank, but only "
            f"{gigabytes(plan.host_available)} GB are available; use more nodes, LoRA or less offloading\n"
            f"{plan.table()}"
        )
    logger.info("%s", plan.table())
    return plan


class MemoryPlanner:
    """Computes memory plans of a run for different layouts and flags.

    Args:
        config: configuration of the run; `config.run.device` determines the kernels and the optimizer.
        model: model on any device, after `set_trainable` and `apply_kernels`.
        sampler: records of each step.
        lengths: lengths of the records of an epoch.
        available: memory available to each rank, in bytes.
        activations: result of `measure_activations`.
        compiled: whether the optimizer step is compiled.
        packs: result of `largest_packs`, if known.
        host_available: host memory available to each rank, in bytes.
        can_replicate: whether `--parallel auto` may choose HSDP: several nodes with the same number of ranks,
            at least two.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: InternVLChatModel,
        sampler: StepSampler,
        lengths: Lengths,
        *,
        available: float,
        activations: Activations,
        compiled: bool,
        packs: LargestPacks | None = None,
        host_available: float = math.inf,
        can_replicate: bool = False,
    ) -> None:
        run, self.sampler, self.lengths = config.run, sampler, lengths
        self.steps, self.checkpoint = run.count_steps(len(sampler)), config.model.grad_checkpoint
        self.can_shard = not (quantization_bytes(model) or has_quantized_state(run.optim))
        self.has_precision, self.can_replicate = run.optim in OWN_OPTIMIZERS, can_replicate
        self.precision, self.available, self.activations = update_precision(run), available, activations
        self.packs = packs or self.largest_packs(sampler.planner.max_packed_tokens)
        self.on_gpu, self.host_available = run.device.type == "cuda", host_available
        self.offload = self.on_gpu and run.cpu_offload  # on a CPU, nothing moves

        def layout(
            parallel: str, precision: str, several_packs: bool, offload: bool
        ) -> tuple[dict[str, int], int]:
            return (
                layout_memory(model, run, parallel, precision, several_packs, compiled, offload),
                layout_host_memory(model, run, parallel, precision, offload),
            )

        self._layout = functools.cache(layout)

    def compute_layouts(self) -> None:
        """Compute the memory of all layouts now, because sharding changes the parameters later."""
        offloads = (False, True) if self.on_gpu else (False,)
        for key in itertools.product(_LAYOUTS, WEIGHT_PRECISIONS, (False, True), offloads):
            self._layout(*key)

    def plan(self, parallel: str, **changed: Any) -> MemoryPlan:
        """Return the fitting plan with the fewest checkpointed layers; if none fits, the one with the most.

        Args:
            parallel: parallel layout.
            changed: values of `precision`, `checkpoint`, `packs` and `offload` that replace those of the run.
        """
        packs, several = changed.get("packs", self.packs)
        precision, offload = changed.get("precision", self.precision), changed.get("offload", self.offload)
        layout, host = self._layout(parallel, precision, several, offload)
        checkpoint, layers = changed.get("checkpoint", self.checkpoint), self.activations.layers
        for count in {"True": [layers], "False": [0]}.get(checkpoint, range(layers + 1)):
            candidates = [(self.activations.for_pack(pack, count), pack, records) for pack, records in packs]
            activations, pack, records = max(candidates, key=lambda candidate: sum(candidate[0].values()))
            plan = MemoryPlan(
                parallel, count, layout | activations, self.available, pack, records, several, layers,
                partial(self.fitting_flags, parallel), host, self.host_available,
            )  # fmt: skip
            if plan.total <= self.available:
                break
        return plan

    def fitting_flags(self, parallel: str, limit: float) -> dict[str, float]:
        """Return each flag that would by itself make the run fit in `limit` bytes, with the planned total."""
        totals = {}
        if parallel != "deepspeed":  # not supported with DeepSpeed
            if self.can_shard:
                totals["--parallel fsdp"] = self.plan("fsdp").total
                if self.on_gpu and (plan := self.plan("fsdp", offload=True)).host <= plan.host_available:
                    totals["--cpu_offload True"] = plan.total
            for name in WEIGHT_PRECISIONS if self.has_precision else ():
                totals[f"--weight_precision {name}"] = self.plan(parallel, precision=name).total
        totals["--grad_checkpoint True"] = self.plan(parallel, checkpoint="True").total
        tokens, total = self.sampler.planner.max_packed_tokens or 0, limit + 1
        while total > limit and tokens > self.lengths.tokens.max():
            tokens //= 2
            total = self.plan(parallel, packs=self.largest_packs(tokens)).total
            totals[f"--max_packed_tokens {tokens}"] = total
        return {flag: total for flag, total in totals.items() if total <= limit}

    def largest_packs(self, max_packed_tokens: int | None) -> LargestPacks:
        """Return the two packs that need the most memory, and whether any rank has multiple packs in a step.

        The first pack needs the most memory without activation checkpointing, the second with it.
        """
        planner = dataclasses.replace(self.sampler.planner, max_packed_tokens=max_packed_tokens)
        tokens = self.lengths.tokens.astype(np.int64)
        columns = PackSize(tokens, self.lengths.supervised, self.lengths.tiles, tokens**2)
        counts = (0, self.activations.layers)
        needs = np.stack([sum(self.activations.for_pack(columns, count).values()) for count in counts])
        largest: list[tuple[float, np.ndarray, int]] = [(-1.0, np.zeros(0, np.int64), 0)] * 2
        several = False
        for step in range(1, self.steps + 1):
            epoch, number = self.sampler.position_of(step)
            ranks = planner(self.sampler.step(epoch, number))
            several = several or max(map(len, ranks)) > 1
            for pack in itertools.chain.from_iterable(ranks):
                candidates = [(needed, pack, epoch) for needed in needs[:, pack].sum(axis=1)]
                pairs = zip(largest, candidates, strict=True)
                largest = [new if new[0] > old[0] else old for old, new in pairs]
        return [
            (PackSize(*(int(c[pack].sum()) for c in columns)), [SampleIndex(int(i), epoch) for i in pack])
            for _, pack, epoch in largest
        ], several


def update_precision(run: RunConfig) -> str:
    """Return the precision of weight updates outside DeepSpeed; library optimizers have no master weights."""
    return run.weight_precision if run.optim in OWN_OPTIMIZERS else "bf16"


def layout_memory(
    model: InternVLChatModel,
    run: RunConfig,
    parallel: str,
    precision: str,
    several_packs: bool,
    compiled: bool,
    offload: bool = False,
) -> dict[str, int]:
    """Return the memory per rank of a parallel layout, keyed by component (see `parallel_memory`)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    scratch = scratch_bytes(precision, trained, "cuda" if run.device.type == "cuda" else "cpu", compiled)
    return parallel_memory(
        model,
        *_sharding(run, parallel),
        optimizer_state=_optimizer_state(model, run, precision),
        optimizer_scratch=scratch,
        several_packs=several_packs,
        zero=zero_section(run),
        offload=offload,
        lazy_pages=run.device.type == "cpu",
    )


def layout_host_memory(
    model: InternVLChatModel, run: RunConfig, parallel: str, precision: str, offload: bool
) -> int:
    """Return the host memory per rank of the state that a parallel layout offloads, in bytes."""
    return offloaded_memory(
        model,
        *_sharding(run, parallel),
        optimizer_state=_optimizer_state(model, run, precision),
        zero=zero_section(run),
        offload=offload,
    )


def _sharding(run: RunConfig, parallel: str) -> tuple[str, int]:
    """Return the layout with the same memory per rank, and the number of ranks across which it shards.

    HSDP needs the same memory as FSDP2 within one node.
    """
    return ("fsdp", run.local_world_size) if parallel == "hsdp" else (parallel, run.world_size)


def _optimizer_state(model: InternVLChatModel, run: RunConfig, precision: str) -> int:
    return state_bytes(run.optim, precision, (p for p in model.parameters() if p.requires_grad))


def zero_section(run: RunConfig) -> dict[str, Any]:
    """Return the `zero_optimization` section of the DeepSpeed configuration; empty without DeepSpeed."""
    return (run.deepspeed or {}).get("zero_optimization", {})


def usable_memory(run: RunConfig) -> float:
    """Return the memory that a run may use on this rank: on a GPU, 95% of its free memory."""
    usable = USABLE if run.device.type == "cuda" else 1
    return usable * available_memory(run.device, run.local_world_size)


def available_memory(device: torch.device, local_ranks: int = 1) -> int:
    """Return the memory available to this rank, including the memory that it already uses.

    On a CPU, this is the rank's share of the host memory.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return available_host_memory() // local_ranks + psutil.Process().memory_info().rss


def max_memory(device: torch.device) -> int:
    """Return the peak memory of this process: GPU memory or, on a CPU, host memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def gigabytes(size: float) -> str:
    """Format a size in GB."""
    return f"{size / 1e9:.4g}"
