"""torchrun, but that signals reach the processes, and how they end is told in a line and by the exit code.

`python -m internvl_chat.train.distributed.launch --nproc_per_node 2 -m MODULE FLAGS` takes torchrun's flags.
"""

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import psutil
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from internvl_chat.train.distributed.signals import (
    LAUNCHER,
    SIGNALS,
    STOPPED_BY,
    STOPPING,
    exit_code,
    stop_with_launcher,
)

# torchrun would end the processes within half a minute; they save first, which may take longer.
_OWN_FLAGS = ("--signals_to_handle", "SIGHUP,SIGQUIT")


def main(argv: Sequence[str] | None = None) -> int:
    """Run torchrun; returns 0, or the exit code of the process that failed first."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # In a store that is shared, processes that are started again find the addresses of those before them.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    stop_with_launcher()
    os.environ[LAUNCHER] = str(os.getpid())
    for number in SIGNALS:
        signal.signal(number, _pass_on)
    with tempfile.TemporaryDirectory(prefix="m3llm-") as folder:
        note = Path(folder) / "stopped_by"
        os.environ[STOPPED_BY] = str(note)
        try:
            torchrun([*_OWN_FLAGS, *(sys.argv[1:] if argv is None else argv)])
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            return report(rank, failure.exitcode)
        return exit_code(signal.Signals[note.read_text(encoding="utf-8")]) if note.is_file() else 0


def _pass_on(number: int, frame: FrameType | None) -> None:
    """Give a signal to the processes that torchrun has started, each of which leads a session of its own."""
    os.environ[STOPPING] = signal.Signals(number).name
    for child in psutil.Process().children():
        try:
            if os.getsid(child.pid) == child.pid:
                os.kill(child.pid, number)
        except ProcessLookupError:
            continue  # it has ended meanwhile


def report(rank: int, code: int) -> int:
    """Say how a process ended, unless it has spoken for itself; returns the exit code to end with."""
    if code < 0:
        name = signal.Signals(-code).name
        sys.stderr.write(f"process {rank} was ended by {name}, and so were the others\n")
        return 128 - code
    if code > 2:
        sys.stderr.write(f"process {rank} failed with exit code {code}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
