"""The largest planned pack, run forward and backward before training, so that memory runs out now or never.

Where memory does not suffice, more layers are recomputed if that was left open; otherwise the run ends with
the flags that would fit.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch

from internvl_chat.data.dataset import Draw, TrainingData
from internvl_chat.data.order import StepSampler
from internvl_chat.model.modeling import InternVLChatModel
from internvl_chat.train.arguments import Arguments, RunArguments
from internvl_chat.train.optim.adamw import OWN_OPTIMIZERS
from internvl_chat.train.preflight.memory import (
    MemoryModel,
    PackSize,
    capacity,
    choose,
    largest_anywhere,
    largest_pack,
    measure_memory,
)
from internvl_chat.utils.distributed import of_all_processes
from internvl_chat.utils.errors import TrainingError
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)


def plan_memory(
    args: Arguments, model: InternVLChatModel, sampler: StepSampler, data: TrainingData
) -> "Rehearsal":
    """Choose recomputed layers and weight precision for the largest pack that any process will meet.

    Args:
        args: the command line.
        model: with its trainable parameters chosen.
        sampler: of the run.
        data: with the lengths of its records.
    """
    run = args.run
    memory = measure_memory(model, shards=_shards(run))
    own = largest_pack(sampler, data.epoch_lengths(), memory, run.count_steps(len(sampler)))
    pack = largest_anywhere(own.size, memory, run.world_size)
    # DeepSpeed keeps float32 masters of its own.
    precision = "master" if run.deepspeed else run.weight_precision
    if run.optim not in OWN_OPTIMIZERS:
        precision = "bf16"
    chosen = choose(
        memory,
        pack,
        min(of_all_processes(capacity(run.device, run.processes_here), run.world_size)),
        precision=precision,
        grad_checkpoint=args.model.grad_checkpoint,
    )
    return Rehearsal(
        memory,
        own.draws,
        pack,
        precision=chosen.weight_precision,
        recomputed=chosen.recomputed_layers,
        may_recompute=args.model.grad_checkpoint == "auto",
        several=any(of_all_processes(own.packs > 1, run.world_size)),
    )


def _shards(run: RunArguments) -> dict[str, int]:
    """Return over how many processes weights, and gradients and optimizer state, are spread."""
    stage = 3 if run.sharded else 0
    if run.deepspeed:
        stage = run.hf_deepspeed_config.get_value("zero_optimization.stage", 0)
    return {"weights": run.world_size if stage == 3 else 1, "state": run.world_size if stage else 1}


@dataclass(frozen=True)
class Rehearsal:
    """What is rehearsed, and what may be changed when it fails.

    Attributes:
        memory: of the process.
        draws: of this process's largest pack.
        pack: the largest one of all processes.
        precision: of the weights.
        recomputed: decoder layers that are recomputed.
        may_recompute: more of them may be.
        several: some step has several packs, so that a pack meets the gradients of the one before it.
    """

    memory: MemoryModel
    draws: list[Draw]
    pack: PackSize
    precision: str
    recomputed: int
    may_recompute: bool
    several: bool = False

    def run(
        self,
        forward_backward: Callable[[], None],
        recompute_layers: Callable[[int], None],
        anywhere: Callable[[bool], bool],
        device: torch.device,
    ) -> int:
        """Rehearse until it fits; returns the layers that are recomputed in the end.

        Args:
            forward_backward: runs the largest pack and discards its gradients.
            recompute_layers: sets how many layers are recomputed.
            anywhere: whether something is true on any process.
            device: that it runs on.

        Raises:
            TrainingError: it does not fit; the message names the flags that would.
        """
        recomputed = self.recomputed
        while True:
            short = anywhere(self._runs_out(forward_backward, device, recomputed))
            if not short:
                return recomputed
            if not self.may_recompute or recomputed >= self.memory.layers:
                raise TrainingError(self._advice(recomputed))
            recomputed = min(self.memory.layers, recomputed + max(1, self.memory.layers // 4))
            logger.warning("memory does not suffice: recomputing %d decoder layers", recomputed)
            recompute_layers(recomputed)

    def _runs_out(self, forward_backward: Callable[[], None], device: torch.device, recomputed: int) -> bool:
        """Say whether memory runs out, now or when the optimizer's state is there too; report the peak."""
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        try:
            forward_backward()
            error = None
        except (torch.OutOfMemoryError, RuntimeError) as raised:
            if not is_out_of_memory(raised):
                raise
            error = str(raised).partition("\n")[0]
        # Only now are the tensors of a failed pass free.
        gc.collect()
        if error is not None:
            logger.warning("the largest pack does not fit: %s", error)
        if not on_gpu:
            if error is None:
                self._report(None, recomputed)
            return error is not None
        torch.cuda.empty_cache()
        if error is not None:
            return True
        peak = torch.cuda.max_memory_allocated(device) + self.memory.optimizer_state(self.precision)
        self._report(peak, recomputed)
        return peak > torch.cuda.get_device_properties(device).total_memory

    def _report(self, peak: int | None, recomputed: int) -> None:
        planned = self.memory.needed(self.pack, self.precision, recomputed)
        found = "" if peak is None else f"; with the optimizer's state it needs {peak / 1e9:.1f} GB"
        logger.info(
            "largest pack: %d tokens (%d supervised), %d tiles; %d of %d decoder layers recomputed, weights: "
            "%s; planned %.1f GB%s",
            self.pack.tokens, self.pack.supervised, self.pack.tiles, recomputed, self.memory.layers,
            self.precision, planned / 1e9, found,
        )  # fmt: skip

    def _advice(self, recomputed: int) -> str:
        flags = ["--max_packed_tokens with fewer tokens", "--max_dynamic_patch with fewer tiles"]
        if recomputed < self.memory.layers:
            flags.insert(0, "--grad_checkpoint True")
        if self.precision == "master":
            flags.append("--weight_precision stochastic")
        if self.memory.trained["bf16"] < self.memory.trained[self.precision]:
            flags.append("--weight_precision bf16 (the reference's way, in which most weights hardly move)")
        flags.append("--fsdp full_shard, or --deepspeed with a ZeRO configuration, on several GPUs")
        return (
            f"the largest pack ({self.pack.tokens} tokens, {self.pack.supervised} supervised, "
            f"{self.pack.tiles} tiles) does not fit into memory; what helps: {'; '.join(flags)}"
        )


def is_out_of_memory(error: Exception) -> bool:
    """Say whether an error means that memory ran out, on a GPU or on a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
