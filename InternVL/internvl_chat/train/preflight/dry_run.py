"""Dry run: run the largest pack before training, so that memory runs out then or never."""

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
    """Run the largest pack; checkpoint more layers where it does not fit and `grad_checkpoint` is `auto`.

    A sharded model is not run a second time: a failed backward pass leaves FSDP with a state in which later
    gradients are wrong. A rank that fails does not wait either: the others are in a collective of the model,
    and the launcher ends them.

    Args:
        plan: of the run.
        forward_backward: runs the largest pack and discards its gradients; no collective unless sharded.
        set_checkpointing: sets the number of checkpointed layers, which is returned in the end.
        device: of this rank.
        sharded: whether forward and backward passes are collectives.
        grad_checkpoint: `auto`, `True` or `False`.
        optimizer_state_loaded: whether the optimizer has its state already, as in a resumed run.

    Raises:
        TrainingError: the pack does not fit; the message has the plan.
    """
    checkpointed = plan.checkpointed_layers
    if plan.parallel == "deepspeed":
        logger.info("no dry run: DeepSpeed would add its gradients to those of the first step")
        return checkpointed
    while True:
        shortage = _shortage(plan, forward_backward, device, optimizer_state_loaded)
        if shortage is None if sharded else not any_rank(shortage is not None):
            return checkpointed
        if sharded or grad_checkpoint != "auto" or checkpointed >= plan.layers:
            reason = f"the largest pack does not fit: {shortage or 'another rank is short of memory'}"
            raise TrainingError(plan.explain_shortage(reason, int(0.9 * plan.total)))
        checkpointed = min(plan.layers, checkpointed + max(1, plan.layers // 4))
        logger.warning(
            "the largest pack does not fit: checkpointing %d of %d decoder layers", checkpointed, plan.layers
        )
        set_checkpointing(checkpointed)


def _shortage(
    plan: MemoryPlan, forward_backward: Callable[[], None], device: torch.device, state_loaded: bool
) -> str | None:
    """Run the largest pack; return the reason if it does not fit together with the optimizer state."""
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
        # Only now are the tensors of the failed pass free.
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
        return error
    peak = max_memory(device) + (0 if state_loaded else plan.components["optimizer state"])
    if plan.parallel == "ddp" and not plan.several_packs:
        # Unreduced gradients are in memory in addition to DDP's buckets; in training they are views of them.
        peak -= plan.components["gradients"]
    measured = "measured" if on_gpu else "peak of the process"
    logger.info("dry run: planned %s GB, %s %s GB", gigabytes(plan.total), measured, gigabytes(peak))
    available = available_memory(device)
    return f"{gigabytes(peak)} of {gigabytes(available)} GB" if on_gpu and peak > available else None


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error means that memory ran out, on a GPU or a CPU."""
    texts = ("allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in texts)
