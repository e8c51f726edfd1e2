"""Rank, world size, and collectives for Python objects and CPU tensors.

The collectives of this module use gloo, with one of two timeouts:
- Within a training step (`in_step`), `--ddp_timeout`, so that a hanging rank ends the run.
- Otherwise, two days, so that ranks can wait while rank 0 writes or checks files.

On GPUs, gradients and weights are communicated with NCCL instead.
"""

import contextlib
import os
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed as dist

from internvl_chat.utils.errors import M3LLMError, TrainingError, UsageError

T = TypeVar("T")

# Long enough to write a large checkpoint or to decode all images on one rank.
_HOST_TIMEOUT = timedelta(days=2)

_host_group: dist.ProcessGroup | None = None


class AgreedError(TrainingError):
    """Error that occurred on one rank and is raised on all ranks."""


def rank() -> int:
    """Return the rank of this process, from torchrun's environment."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return the rank of this process on its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Return the number of ranks."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Return the number of ranks on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def shard(items: Sequence[T]) -> Sequence[T]:
    """Return this rank's shard of the items: every `world_size`-th item, starting at `rank`.

    >>> shard(["a", "b", "c"])
    ['a', 'b', 'c']
    """
    return items[rank() :: world_size()]


def set_device(device: torch.device) -> None:
    """Set the current GPU of this thread; without this call, a thread uses GPU 0."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def init_process_group(device: torch.device, timeout: timedelta) -> None:
    """Set the current device and, with multiple ranks, create the default process group.

    Args:
        device: device of this rank; with a GPU, the group also has the NCCL backend.
        timeout: timeout of collectives within a training step.
    """
    set_device(device)
    if world_size() == 1 or dist.is_initialized():
        return
    if device.type == "cuda":
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=timeout)


def init_single_rank(device: torch.device) -> None:
    """Create a process group if there is no launcher; FSDP2 and DeepSpeed require one even for one rank."""
    if dist.is_initialized():
        return
    os.environ.setdefault("LOCAL_RANK", "0")
    set_device(device)
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    if device.type == "cuda":
        dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1, device_id=device)
    else:
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)


def host_group() -> dist.ProcessGroup | None:
    """Return the gloo group with the long timeout; None with a single rank.

    The first call is collective: call on all ranks.
    """
    global _host_group
    if _host_group is None and dist.is_initialized():
        _host_group = new_host_group()
    return _host_group


def new_host_group() -> dist.ProcessGroup | None:
    """Create another gloo group with the long timeout, so that a second thread can use collectives.

    Collective: call on all ranks.
    """
    if not dist.is_initialized():
        return None
    group = dist.new_group(backend="gloo", timeout=_HOST_TIMEOUT)
    return group if isinstance(group, dist.ProcessGroup) else None


def destroy_process_group() -> None:
    """Destroy the process group after waiting for all ranks, because an early exit would abort the others."""
    global _host_group
    if dist.is_initialized():
        barrier()
        _host_group = None
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier(group=host_group())


def all_gather_object(value: T, *, in_step: bool = False) -> list[T]:
    """Return a list of the values of all ranks, in rank order; values must be picklable."""
    if not dist.is_initialized():
        return [value]
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_group(in_step))
    return values


def broadcast_object(value: T) -> T:
    """Return the value of rank 0 on all ranks."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=host_group())
    return values[0]


def run_on_rank_0(function: Callable[[], T]) -> T:
    """Call a function on rank 0 only; all ranks return its result or raise its `M3LLMError`."""
    result: Any = None
    error: M3LLMError | None = TrainingError("rank 0 failed; see its error message")
    try:
        if rank() == 0:
            result, error = function(), None
    except M3LLMError as failure:
        error = failure
    finally:
        # Broadcast even after an unexpected exception; otherwise the other ranks would wait.
        result, error = broadcast_object((result, error))
    if error is not None:
        raise error
    return result


def agree(error: Exception | None, value: Any = None, *, group: dist.ProcessGroup | None) -> list[Any]:
    """Return the values of all ranks, or raise an error on all ranks if any rank has one.

    Collective: call on all ranks, and before other collectives, in which ranks would wait for a failed one.

    Raises:
        AgreedError: the error of the first rank that has one.
    """
    results = [(None if error is None else str(error) or repr(error), value)]
    if group is not None:
        local, results = results[0], results * world_size()
        dist.all_gather_object(results, local, group=group)
    for number, (problem, _) in enumerate(results):
        if problem is not None:
            raise AgreedError(problem if number == rank() else f"rank {number}: {problem}") from error
    return [value for _, value in results]


def all_reduce_sum(values: torch.Tensor, *, in_step: bool = False) -> torch.Tensor:
    """Return the sum of a CPU tensor across ranks."""
    if not dist.is_initialized():
        return values
    total = values.clone()
    dist.all_reduce(total, group=_group(in_step))
    return total


def any_rank(flag: bool) -> bool:
    """Return whether the flag is set on any rank."""
    return bool(all_reduce_sum(torch.tensor([float(flag)], dtype=torch.float64)).item())


def is_shared(folder: Path) -> bool:
    """Return whether all ranks see a file that rank 0 writes to a folder. Collective: call on all ranks.

    Raises:
        UsageError: rank 0 cannot write to the folder.
    """
    if world_size() == local_world_size():
        return True
    marker = folder / run_on_rank_0(lambda: _write_marker(folder))
    is_shared = not any_rank(not marker.is_file())
    if rank() == 0:
        with contextlib.suppress(OSError):
            marker.unlink()
            folder.rmdir()  # fails if it contains other files
    return is_shared


def _write_marker(folder: Path) -> str:
    """Write an empty file with a unique name, which no node has cached as missing; return the name."""
    name = f"shared-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written to: {error.strerror}") from None
    return name


def _group(in_step: bool) -> dist.ProcessGroup | None:
    """Return the group with the timeout of a training step if `in_step`, otherwise the host group."""
    return dist.group.WORLD if in_step else host_group()
