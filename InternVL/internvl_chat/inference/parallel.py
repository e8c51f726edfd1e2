"""Ranks started by torchrun, each with its share of the work and without communication between them."""

import os
from collections.abc import Sequence
from typing import TypeVar

import torch

T = TypeVar("T")


def process_index() -> int:
    """Return the rank of this process."""
    return int(os.environ.get("RANK", "0"))


def process_count() -> int:
    """Return the world size; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_device() -> torch.device:
    """Return the GPU of this rank, or the CPU if there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def share(items: Sequence[T]) -> Sequence[T]:
    """Return the items of this rank: with n ranks, every n-th item.

    >>> share(["a", "b", "c"])
    ['a', 'b', 'c']
    """
    return items[process_index() :: process_count()]
