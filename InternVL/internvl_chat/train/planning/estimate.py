"""Plan a run on given hardware: memory, speed, checkpoints and cost of each parallel mode."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from internvl_chat.data.batching.packing import StepPlanner
from internvl_chat.data.batching.sampler import StepSampler
from internvl_chat.data.sources.meta import DatasetSpec
from internvl_chat.model.attention import VARLEN
from internvl_chat.model.configuration import InternVLChatConfig
from internvl_chat.model.flops import FlopCounter, count_flops
from internvl_chat.model.io.checkpoint import empty_model
from internvl_chat.model.kernels.apply import apply_kernels
from internvl_chat.model.lora.quantization import parameter_count, quantize_decoder
from internvl_chat.model.memory import Activations, measure_activations, saves_linear_inputs
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel
from internvl_chat.train.checks import layout_problems
from internvl_chat.train.config import RunConfig, TrainConfig
from internvl_chat.train.freeze import set_trainable
from internvl_chat.train.planning.hardware import Hardware
from internvl_chat.train.planning.modes import Mode, modes_for
from internvl_chat.train.planning.speed import (
    MAX_PAIRS,
    Load,
    StepTime,
    Work,
    busiest_rank,
    optimizer_bytes,
    sent_bytes,
    step_time,
)
from internvl_chat.train.planning.workload import Workload
from internvl_chat.train.preflight.memory import (
    USABLE,
    LargestPacks,
    MemoryPlan,
    MemoryPlanner,
    layout_memory,
    update_precision,
    zero_section,
)
from internvl_chat.train.setup import prepare_model

# Minimum numbers of records and steps that are searched for the largest pack if not all are searched.
_SAMPLED_RECORDS, _SAMPLED_STEPS = 4000, 50
# A mode is preferred to an earlier one in `MODES` only if it is faster by this fraction.
_MARGIN = 0.03


@dataclass(frozen=True, eq=False)
class PlannedModel:
    """A model without weights, prepared as for training.

    Attributes:
        config: training flags.
        model: model on the meta device.
        device: device type for training: `cuda` or `cpu`.
    """

    config: TrainConfig
    model: InternVLChatModel
    device: str

    @classmethod
    def build(
        cls,
        config: TrainConfig,
        model_config: InternVLChatConfig,
        device: str,
        specs: Sequence[DatasetSpec] = (),
    ) -> "PlannedModel":
        """Build the model from its configuration and apply the training flags.

        Args:
            config: training flags.
            model_config: configuration of the model.
            device: `cuda` or `cpu`.
            specs: training datasets, which may have their own tile limits.
        """
        options = config.model
        with torch.device("meta"):
            model = empty_model(model_config, 0, config.run.dtype, VARLEN)
        if options.load_in_4bit:
            quantize_decoder(model)
        with torch.device("meta"):
            prepare_model(model, config, specs or [DatasetSpec("plan", Path(), Path())])
        set_trainable(
            model,
            freeze_llm=options.freeze_llm,
            freeze_mlp=options.freeze_mlp,
            freeze_backbone=options.freeze_backbone,
            unfreeze_vit_layers=options.unfreeze_vit_layers,
            unfreeze_lm_head=options.unfreeze_lm_head,
        )
        apply_kernels(model, torch.device(device), liger=False)
        return cls(config, model.train(), device)

    @cached_property
    def counter(self) -> FlopCounter:
        """FLOP counts of the model."""
        return count_flops(self.model)

    @cached_property
    def activations(self) -> Activations:
        """Sizes of the activations."""
        return self._measure(linear_inputs=False)

    @cached_property
    def zero3_activations(self) -> Activations:
        """Sizes of the activations with ZeRO-3; see `saves_linear_inputs`."""
        return self._measure(linear_inputs=True)

    def _measure(self, *, linear_inputs: bool) -> Activations:
        """Measure the activations; for a GPU, on the meta device."""
        device = torch.device("meta" if self.device == "cuda" else "cpu")
        return measure_activations(self.model, device, linear_inputs=linear_inputs)

    @cached_property
    def trained(self) -> dict[str, int]:
        """Number of trained weights by dtype."""
        counts = {"float32": 0, "bfloat16": 0}
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                counts[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
        return counts

    @cached_property
    def size(self) -> dict[str, int]:
        """Bytes of all weights, of the trained weights, and of the weights in a checkpoint."""
        parameters = list(self.model.parameters())
        trained = sum(p.nbytes for p in parameters if p.requires_grad)
        total = sum(p.nbytes for p in parameters)
        has_adapters = self.model.config.use_llm_lora or self.model.config.use_backbone_lora
        return {"all": total, "trained": trained, "saved": trained if has_adapters else total}

    @property
    def parameters(self) -> tuple[int, int]:
        """Total and trainable parameter counts."""
        return sum(map(parameter_count, self.model.parameters())), sum(self.trained.values())


@dataclass(frozen=True)
class Estimate:
    """Prediction for one parallel mode.

    Attributes:
        mode: the parallel mode.
        ranks: number of ranks.
        nodes: number of nodes.
        batch_size: records per step.
        memory: memory plan of a rank; contains the largest pack.
        step: duration of a step.
        work: work of the busiest rank in a step.
        balance: FLOPs of the busiest rank, divided by the mean of all ranks.
        steps: steps per epoch.
        records: records per epoch.
        checkpoint_bytes: size of a checkpoint.
        checkpoint_seconds: time to write a checkpoint.
        price: price per device and hour; None if unknown.
    """

    mode: Mode
    ranks: int
    nodes: int
    batch_size: int
    memory: MemoryPlan = field(repr=False)
    step: StepTime
    work: Work
    balance: float
    steps: int
    records: int
    checkpoint_bytes: float
    checkpoint_seconds: float
    price: float | None

    @property
    def fits(self) -> bool:
        """Whether the largest pack fits in memory."""
        return self.memory.total <= self.memory.available

    @property
    def epoch_hours(self) -> float:
        """Duration of an epoch, without checkpoints."""
        return self.steps * self.step.total / 3600

    @property
    def device_hours(self) -> float:
        """Device hours of an epoch, without idle devices."""
        return self.epoch_hours * self.ranks

    @property
    def cost(self) -> float | None:
        """Price of an epoch; None if the price is unknown."""
        return None if self.price is None else self.price * self.device_hours

    def to_dict(self) -> dict[str, Any]:
        """Return the prediction as JSON values; sizes in GB."""
        return {
            "mode": self.mode.name,
            "ranks": self.ranks,
            "nodes": self.nodes,
            "batch_size": self.batch_size,
            "fits": self.fits,
            "memory_gb": self.memory.total / 1e9,
            "available_gb": self.memory.available / 1e9,
            "components_gb": {name: size / 1e9 for name, size in self.memory.components.items()},
            "checkpointed_layers": self.memory.checkpointed_layers,
            "largest_pack": {name: int(n) for name, n in self.memory.pack._asdict().items()},
            "step_seconds": dataclasses.asdict(self.step) | {"total": self.step.total},
            "limited_by": self.step.limit,
            "balance": self.balance,
            "records_per_second": self.records / self.epoch_hours / 3600,
            "epoch_hours": self.epoch_hours,
            "device_hours": self.device_hours,
            "cost": self.cost,
            "checkpoint_gb": self.checkpoint_bytes / 1e9,
            "checkpoint_seconds": self.checkpoint_seconds,
        }


class Planner:
    """Predicts runs of one model on one kind of hardware, for all parallel modes.

    Args:
        planned: the model.
        workload: records of an epoch.
        hardware: device and connections of a rank.
    """

    def __init__(self, planned: PlannedModel, workload: Workload, hardware: Hardware) -> None:
        self.planned, self.workload, self.hardware = planned, workload, hardware
        lengths = workload.lengths
        self._costs = planned.counter.records(lengths.tokens, lengths.supervised, lengths.tiles)

    def compare(self, ranks: int, nodes: int, batch_size: int) -> list[Estimate]:
        """Return the predictions of the modes that support the flags; `ranks` must divide `batch_size`."""
        sampler = self._sampler(ranks, batch_size)
        loads: dict[float, Load] = {}
        packs, estimates = None, []
        # Balancing a batch over thousands of ranks is slow. A random local batch has similar packs.
        local = self._sampler(1, batch_size // ranks) if batch_size * ranks > MAX_PAIRS else sampler
        for mode in modes_for(ranks, nodes):
            config = self._config(mode, ranks, nodes, batch_size)
            if any(layout_problems(config)):
                continue
            planner = self._memory(config, local, packs)
            packs = planner.packs
            memory = planner.plan(mode.parallel)
            share = memory.checkpointed_layers / memory.layers
            if share not in loads:
                loads[share] = busiest_rank(sampler, self.workload.lengths, self.planned.counter, share)
            estimates.append(self._estimate(mode, ranks, nodes, config.run, memory, loads[share]))
        return estimates

    def _sampler(self, ranks: int, batch_size: int) -> StepSampler:
        run, lengths = self.planned.config.run, self.workload.lengths
        step_planner = StepPlanner(
            ranks,
            tokens=lengths.tokens,
            costs=self._costs,
            max_packed_tokens=run.max_packed_tokens if run.packing else None,
            records_per_pack=run.records_per_pack,
        )
        return StepSampler(
            [len(lengths)],
            step_records=batch_size,
            planner=step_planner,
            seed=run.seed,
            strategy=run.train_sampling_strategy,
        )

    def _config(self, mode: Mode, ranks: int, nodes: int, batch_size: int) -> TrainConfig:
        config, run = self.planned.config, self.planned.config.run
        exact = self.workload.exact and batch_size * ranks <= MAX_PAIRS
        run = dataclasses.replace(
            run,
            device=torch.device(self.planned.device),
            world_size=ranks,
            local_world_size=ranks // nodes,
            records_per_rank=batch_size // ranks,
            records_per_step=batch_size,
            parallel=mode.parallel,
            deepspeed=mode.deepspeed,
            max_steps=run.max_steps if exact else max(_SAMPLED_STEPS, _SAMPLED_RECORDS // batch_size),
        )
        return TrainConfig(config.model, config.data, run)

    def _memory(self, config: TrainConfig, sampler: StepSampler, packs: LargestPacks | None) -> MemoryPlanner:
        planned, usable = self.planned, USABLE if self.planned.device == "cuda" else 1
        saves_inputs = saves_linear_inputs(zero_section(config.run))
        return MemoryPlanner(
            config,
            planned.model,
            sampler,
            self.workload.lengths,
            available=usable * self.hardware.memory,
            activations=planned.zero3_activations if saves_inputs else planned.activations,
            compiled=self._compiled(config.run),
            packs=packs,
        )

    def _compiled(self, run: RunConfig) -> bool:
        return self.planned.device == "cuda" and update_precision(run) != "bf16"

    def _estimate(
        self, mode: Mode, ranks: int, nodes: int, run: RunConfig, memory: MemoryPlan, load: Load
    ) -> Estimate:
        planned, hardware, batch_size = self.planned, self.hardware, run.records_per_step
        # DeepSpeed updates float32 master weights with torch's AdamW.
        precision = "master" if mode.zero else update_precision(run)
        compiled = self._compiled(run) and not mode.zero
        state = layout_memory(
            planned.model,
            dataclasses.replace(run, world_size=1, local_world_size=1),
            mode.parallel,
            precision,
            False,
            compiled,
        )["optimizer state"]
        shard = memory.components["optimizer state"] / state if state else 0.0
        updated = shard * optimizer_bytes(planned.trained, precision, compiled=compiled)
        sent = sent_bytes(mode, ranks, nodes, planned.size["all"], planned.size["trained"], load.packs)
        work = Work(load.flops, load.packs, updated, **sent)
        saved = planned.size["saved"] + state
        return Estimate(
            mode=mode,
            ranks=ranks,
            nodes=nodes,
            batch_size=batch_size,
            memory=memory,
            step=step_time(hardware, work, ranks=ranks, nodes=nodes),
            work=work,
            balance=load.balance,
            steps=math.ceil(self.workload.records / batch_size),
            records=self.workload.records,
            checkpoint_bytes=saved,
            checkpoint_seconds=saved / hardware.disk,
            price=hardware.price,
        )


def usable_ranks(batch_size: int, gpus: int, nodes: int) -> tuple[int, int]:
    """Return the ranks per node and the number of nodes that divide a batch and use the most GPUs.

    >>> usable_ranks(2, 8, 2), usable_ranks(16, 8, 2), usable_ranks(6, 4, 2)
    ((2, 1), (8, 2), (3, 2))
    """
    pairs = [
        (g, n) for n in _divisors(batch_size) if n <= nodes for g in _divisors(batch_size // n) if g <= gpus
    ]
    return max(pairs, key=lambda pair: (pair[0] * pair[1], pair[0]))


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def recommend(estimates: Sequence[Estimate]) -> Estimate | None:
    """Return the first mode that fits and is about as fast as the fastest that fits; None if none fits."""
    fitting = [estimate for estimate in estimates if estimate.fits]
    if not fitting:
        return None
    fastest = min(estimate.step.total for estimate in fitting)
    return next(estimate for estimate in fitting if estimate.step.total <= (1 + _MARGIN) * fastest)
