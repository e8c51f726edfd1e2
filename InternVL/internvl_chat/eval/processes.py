"""Which of the processes of torchrun this is; by itself it is the only one."""

import os
from datetime import timedelta

# One process may have the long answers: the others wait for it, and torchrun ends them if it dies.
_LONGEST_WAIT = timedelta(days=7)


def process_index() -> int:
    """Return this process's number, from 0."""
    return int(os.environ.get("RANK", "0"))


def process_count() -> int:
    """Return how many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_device(name: str | None) -> str | None:
    """Return the device of this process: the named one, or of several processes each a GPU of its own."""
    import torch

    if name is None and process_count() > 1 and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return name


def wait_for_all() -> None:
    """Return when all processes have come here."""
    if process_count() == 1:
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=_LONGEST_WAIT)
    dist.barrier()
    dist.destroy_process_group()
