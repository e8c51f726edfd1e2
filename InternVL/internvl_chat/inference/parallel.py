"""The processes that torchrun has started, each with a part of the work; none of them waits for another."""

import os
from collections.abc import Sequence
from typing import TypeVar

import torch

T = TypeVar("T")


def process_index() -> int:
    """Return this process's number among all, from 0."""
    return int(os.environ.get("RANK", "0"))


def process_count() -> int:
    """Return how many processes there are; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_device() -> torch.device:
    """Return the GPU of this process, its own where there are several processes, or else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def share(items: Sequence[T]) -> Sequence[T]:
    """Return this process's part: of n processes, every n-th item.

    >>> share(["a", "b", "c"])
    ['a', 'b', 'c']
    """
    return items[process_index() :: process_count()]
