"""Logging with multiple ranks: rank 0 logs everything, the other ranks only warnings and errors."""

import logging
import os
import sys


class _RankFilter(logging.Filter):
    """On ranks other than 0, drop records below WARNING and prefix the others with the rank."""

    def filter(self, record: logging.LogRecord) -> bool:
        rank = int(os.environ.get("RANK", "0"))
        if rank and record.levelno >= logging.WARNING:
            record.msg = f"[rank {rank}] {record.msg}"
        return rank == 0 or record.levelno >= logging.WARNING


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module, filtered by rank."""
    logger = logging.getLogger(name)
    if not any(isinstance(f, _RankFilter) for f in logger.filters):
        logger.addFilter(_RankFilter())
    return logger


def configure_logging() -> None:
    """Log this package's messages to standard error, with time and level."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    root = logging.getLogger("internvl_chat")
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    root.propagate = False
    # torchao and bitsandbytes log warnings on import that users cannot act on.
    for name in ("torch.utils._pytree", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
