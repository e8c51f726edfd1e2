"""Dry run: run the largest pack before training, so that an out-of-memory error occurs early."""

import gc

import torch

from internvl_chat.train.loop import TrainingLoop
from internvl_chat.train.preflight.memory import MemoryPlan, available_memory, gigabytes, max_memory
from internvl_chat.utils.distributed import any_rank
from internvl_chat.utils.errors import TrainingError
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)


def run_dry_run(loop: TrainingLoop, plan: MemoryPlan, grad_checkpoint: str) -> int:
    """Run the largest pack; if it does not fit and `grad_checkpoint` is `auto`, checkpoint more layers.

    A sharded model gets only one try, because FSDP's gradients are wrong after a failed backward pass. A rank
    that runs out of memory raises at once; the launcher then ends the others, which wait in a collective.

    Returns:
        The number of checkpointed layers.

    Raises:
        DataError: a record of the pack is unusable.
        TrainingError: the pack does not fit; the message contains the memory plan.
    """
    checkpointed, sharded = plan.checkpointed_layers, loop.strategy.shards_weights
    if plan.parallel == "deepspeed":
        logger.info("dry run skipped: with DeepSpeed, its gradients would accumulate into the first step")
        return checkpointed
    while True:
        shortage = _shortage(loop, plan)
        if shortage is None if sharded else not any_rank(shortage is not None):
            return checkpointed
        if sharded or grad_checkpoint != "auto" or checkpointed >= plan.layers:
            reason = f"the largest pack does not fit: {shortage or 'another rank is out of memory'}"
            raise TrainingError(plan.explain_shortage(reason, int(0.9 * plan.total)))
        checkpointed = min(plan.layers, checkpointed + max(1, plan.layers // 4))
        logger.warning(
            "the largest pack does not fit: checkpointing %d of %d decoder layers", checkpointed, plan.layers
        )
        loop.strategy.model.checkpoint_layers(checkpointed)


def _shortage(loop: TrainingLoop, plan: MemoryPlan) -> str | None:
    """Run the largest pack; return an error message if the pack and the optimizer state do not fit."""
    device = loop.run.device
    on_gpu, error = device.type == "cuda", None
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    try:
        _run_largest_pack(loop, plan)
    except RuntimeError as raised:
        if not is_out_of_memory(raised):
            raise
        error = str(raised).partition("\n")[0]
    if error is not None:
        # Free the tensors of the failed pass; inside the except block, the traceback would keep them alive.
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
        return error
    peak = max_memory(device) + (0 if loop.strategy.optimizer.state else plan.components["optimizer state"])
    if plan.parallel == "ddp" and not plan.several_packs:
        # Here, gradients are not reduced and need memory in addition to DDP's buckets. In training, they are
        # views of the buckets.
        peak -= plan.components["gradients"]
    measured = "measured" if on_gpu else "peak of the process"
    logger.info("dry run: planned %s GB, %s %s GB", gigabytes(plan.total), measured, gigabytes(peak))
    available = available_memory(device)
    return f"{gigabytes(peak)} of {gigabytes(available)} GB" if on_gpu and peak > available else None


def _run_largest_pack(loop: TrainingLoop, plan: MemoryPlan) -> None:
    """Run forward and backward passes of the largest pack and discard the gradients."""
    pack, strategy, device = loop.packs[plan.sample_indices], loop.strategy, loop.run.device
    if isinstance(pack, Exception):
        raise pack
    # With multiple packs per step, later packs run while gradients are in memory, so run the pack twice.
    packs = [pack] * (2 if plan.several_packs else 1)
    weights = [torch.ones(len(pack.keys), dtype=torch.float64)] * len(packs)
    strategy.wrapped.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            # With sharded weights, `zero_grad` frees only reduced gradients.
            loop.forward_backward(packs, weights, 1.0, sync=strategy.shards_weights)
        finally:
            strategy.optimizer.zero_grad()


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error reports that GPU or host memory is exhausted."""
    texts = ("allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in texts)
