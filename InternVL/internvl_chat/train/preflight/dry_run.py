"""Dry run: run the largest pack before training, so that a run does not run out of memory later."""

import gc
from collections.abc import Callable

import torch

from internvl_chat.train.preflight.memory import MemoryPlan, available_memory, gigabytes, max_memory
from internvl_chat.utils.distributed import any_rank
from internvl_chat.utils.errors import TrainingError
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)


def run_dry_run(
    plan: MemoryPlan,
    forward_backward: Callable[[], None],
    set_checkpointing: Callable[[int], None],
    *,
    device: torch.device,
    sharded: bool,
    grad_checkpoint: str,
    optimizer_state_loaded: bool,
) -> int:
    """Run the largest pack; if it does not fit and `grad_checkpoint` is `auto`, checkpoint more layers.

    A sharded model is not run again, because gradients are wrong after a failed backward pass with FSDP. A
    rank that fails raises immediately: the others wait in a collective, and the launcher ends them.

    Args:
        plan: the memory plan.
        forward_backward: runs the largest pack and discards its gradients; a collective only if sharded.
        set_checkpointing: sets the number of checkpointed layers.
        device: device of this rank.
        sharded: whether forward and backward passes are collectives.
        grad_checkpoint: `auto`, `True` or `False`.
        optimizer_state_loaded: whether the optimizer state is already in memory, as in a resumed run.

    Returns:
        The number of checkpointed layers.

    Raises:
        TrainingError: the pack does not fit; the message has the memory plan.
    """
    checkpointed = plan.checkpointed_layers
    if plan.parallel == "deepspeed":
        logger.info("no dry run: DeepSpeed would add the gradients to those of the first step")
        return checkpointed
    while True:
        shortage = _shortage(plan, forward_backward, device, optimizer_state_loaded)
        if shortage is None if sharded else not any_rank(shortage is not None):
            return checkpointed
        if sharded or grad_checkpoint != "auto" or checkpointed >= plan.layers:
            reason = f"the largest pack does not fit: {shortage or 'another rank is out of memory'}"
            raise TrainingError(plan.explain_shortage(reason, int(0.9 * plan.total)))
        checkpointed = min(plan.layers, checkpointed + max(1, plan.layers // 4))
        logger.warning(
            "the largest pack does not fit: checkpointing %d of %d decoder layers", checkpointed, plan.layers
        )
        set_checkpointing(checkpointed)


def _shortage(
    plan: MemoryPlan, forward_backward: Callable[[], None], device: torch.device, state_loaded: bool
) -> str | None:
    """Run the largest pack; return a message if it does not fit together with the optimizer state."""
    on_gpu, error = device.type == "cuda", None
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    try:
        forward_backward()
    except RuntimeError as raised:
        if not is_out_of_memory(raised):
            raise
        error = str(raised).partition("\n")[0]
    if error is not None:
        # The tensors of the failed pass can only be freed outside the except block.
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
        return error
    peak = max_memory(device) + (0 if state_loaded else plan.components["optimizer state"])
    if plan.parallel == "ddp" and not plan.several_packs:
        # Unreduced gradients are stored next to DDP's buckets; in training they are views of the buckets.
        peak -= plan.components["gradients"]
    measured = "measured" if on_gpu else "peak of the process"
    logger.info("dry run: planned %s GB, %s %s GB", gigabytes(plan.total), measured, gigabytes(peak))
    available = available_memory(device)
    return f"{gigabytes(peak)} of {gigabytes(available)} GB" if on_gpu and peak > available else None


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error is an out-of-memory error of a GPU or a CPU."""
    texts = ("allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in texts)
