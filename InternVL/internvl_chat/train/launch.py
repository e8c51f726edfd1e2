"""torchrun, but that a process which fails is reported in a line, and its exit code is the launcher's.

The flags are torchrun's: `python -m internvl_chat.train.launch --nproc_per_node 2 -m MODULE FLAGS`.
"""

import logging
import signal
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun


def main(argv: Sequence[str] | None = None) -> int:
    """Run torchrun; returns 0, or the exit code of the process that failed first."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        torchrun(list(sys.argv[1:] if argv is None else argv))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return report(rank, failure.exitcode)
    return 0


def report(rank: int, exit_code: int) -> int:
    """Say how a process ended, unless it has spoken for itself; returns the exit code to end with."""
    if exit_code < 0:
        name = signal.Signals(-exit_code).name
        sys.stderr.write(f"process {rank} was ended by {name}, and so were the others\n")
        return 128 - exit_code
    if exit_code > 2:
        sys.stderr.write(f"process {rank} failed with exit code {exit_code}\n")
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
