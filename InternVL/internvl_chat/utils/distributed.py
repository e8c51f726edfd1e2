"""What the processes of a run tell one another."""

from typing import TypeVar

import torch

T = TypeVar("T")


def of_all_processes(value: T, processes: int) -> list[T]:
    """Return what each of so many processes gives, whatever can be pickled, in the order of their ranks."""
    values = [value] * processes
    if processes > 1:
        torch.distributed.all_gather_object(values, value)
    return values
