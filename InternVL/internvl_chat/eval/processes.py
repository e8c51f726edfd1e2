"""Where the processes of torchrun meet before their answers are brought together."""

from datetime import timedelta

from internvl_chat.inference.parallel import process_count

# One process may have the long answers: the others wait for it, and torchrun ends them if it dies.
_LONGEST_WAIT = timedelta(days=7)


def wait_for_all() -> None:
    """Return when all processes have come here."""
    if process_count() == 1:
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=_LONGEST_WAIT)
    dist.barrier()
    dist.destroy_process_group()
