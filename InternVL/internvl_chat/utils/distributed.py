"""Process groups: rank, world size, and collectives of Python objects that never use the GPU.

Everything here runs over gloo. Outside of a training step the timeout is days, so that ranks may wait for
rank 0 to write or check something; within a step (`in_step`) it is `--ddp_timeout`, so that a rank that hangs
ends the run. Gradients and weights go over NCCL where there is a GPU.
"""

import os
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed as dist

T = TypeVar("T")

# How long the other ranks wait for one that writes a checkpoint or decodes every image.
_HOST_TIMEOUT = timedelta(days=2)

_host_group: dist.ProcessGroup | None = None


def rank() -> int:
    """Return the rank of this process, from the environment that torchrun sets."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return the rank of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Return the number of processes of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Return the number of processes of the run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def set_device(device: torch.device) -> None:
    """Make a GPU the current one of this thread; each thread starts with GPU 0."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def init_process_group(device: torch.device, timeout: timedelta) -> None:
    """Make the device current and join the run's process group, unless there is a single process.

    Args:
        device: of this process; a GPU adds NCCL for its tensors.
        timeout: of NCCL collectives, and of gloo collectives in the training step.
    """
    set_device(device)
    if world_size() == 1 or dist.is_initialized():
        return
    if device.type == "cuda":
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=timeout)


def host_group() -> dist.ProcessGroup | None:
    """Return the gloo group with the long timeout; None for a single process.

    The first call is a collective.
    """
    global _host_group
    if _host_group is None and dist.is_initialized():
        _host_group = new_host_group()
    return _host_group


def new_host_group() -> dist.ProcessGroup | None:
    """Make another gloo group with the long timeout, for a thread of its own; a collective."""
    return dist.new_group(backend="gloo", timeout=_HOST_TIMEOUT) if dist.is_initialized() else None


def destroy_process_group() -> None:
    """Wait for the other ranks and leave the group; a rank that left early would take the others down."""
    global _host_group
    if dist.is_initialized():
        barrier()
        _host_group = None
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until every rank is here."""
    if dist.is_initialized():
        dist.barrier(group=host_group())


def all_gather_object(value: T, *, in_step: bool = False) -> list[T]:
    """Return the value of every rank, anything that can be pickled, in rank order."""
    if not dist.is_initialized():
        return [value]
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_group(in_step))
    return values


def broadcast_object(value: T, source: int = 0) -> T:
    """Return the value of the source rank on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source, group=host_group())
    return box[0]


def all_reduce_sum(values: torch.Tensor, *, in_step: bool = False) -> torch.Tensor:
    """Return the sum of a CPU tensor over the ranks."""
    if not dist.is_initialized():
        return values
    total = values.clone()
    dist.all_reduce(total, group=_group(in_step))
    return total


def any_rank(flag: bool) -> bool:
    """Return whether the flag is set on any rank."""
    return bool(all_reduce_sum(torch.tensor([float(flag)], dtype=torch.float64)).item())


def _group(in_step: bool) -> dist.ProcessGroup | None:
    """Return the group with the timeout of a training step, or the one with the long timeout."""
    return dist.group.WORLD if in_step else host_group()
