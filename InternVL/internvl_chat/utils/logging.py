"""A logger that speaks once per run, not once per process."""

import logging
import os
import sys


class _MainProcessOnly(logging.Filter):
    """Let warnings of every process through, and information of the first one only."""

    def filter(self, record: logging.LogRecord) -> bool:
        rank = int(os.environ.get("RANK", "0"))
        if rank and record.levelno >= logging.WARNING:
            record.msg = f"[process {rank}] {record.msg}"
        return rank == 0 or record.levelno >= logging.WARNING


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module, silent below warnings except on the main process."""
    logger = logging.getLogger(name)
    if not any(isinstance(f, _MainProcessOnly) for f in logger.filters):
        logger.addFilter(_MainProcessOnly())
    return logger


def configure_logging(level: int = logging.INFO) -> None:
    """Write this package's log lines, with time and level, to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    root = logging.getLogger("internvl_chat")
    root.handlers[:] = [handler]
    root.setLevel(level)
    root.propagate = False
