"""Console output: one line per logging interval, and a progress bar on a terminal."""

import contextlib
import logging
import sys
from collections import deque
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

# The time left is estimated from the mean duration of this many recent steps.
_RECENT_STEPS = 100


class Console:
    """Console output of a run.

    Args:
        first_step: first step after the start or resume (1-based).
        show_bar: show a progress bar if standard error is a terminal.
    """

    def __init__(self, total_steps: int, *, first_step: int, show_bar: bool) -> None:
        self.total_steps = total_steps
        self._rows: list[dict[str, Any]] = []
        self._seconds: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._steps, self._pauses = 0, 0.0
        self._open = contextlib.ExitStack()
        self._bar = None
        if show_bar and sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=first_step - 1, unit="step", dynamic_ncols=True)
            self._open.enter_context(self._bar)
            self._open.enter_context(logging_redirect_tqdm([logging.getLogger("internvl_chat")]))

    def step(self, row: dict[str, Any], *, due: bool = True) -> dict[str, float] | None:
        """Add a row from `metrics_row`; if `due`, log and return the averages since the last log line."""
        self._rows.append(row)
        self._seconds.append(row["seconds"])
        self._steps, self._pauses = self._steps + 1, self._pauses + row["pause_seconds"]
        if self._bar is not None:
            self._bar.update()
        if not due:
            return None
        metrics = average(self._rows)
        self._rows.clear()
        # Pauses are rare, so they are averaged over all steps.
        per_step = sum(self._seconds) / len(self._seconds) + self._pauses / self._steps
        left = (self.total_steps - row["step"]) * per_step
        logger.info("%s", format_line(row["step"], self.total_steps, metrics, left))
        return metrics

    def close(self) -> None:
        """Close the progress bar."""
        self._open.close()


def average(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the average metrics of an interval of steps, given their rows from `metrics_row`.

    The loss is averaged over records and the gradient norm over steps, without skipped steps. Throughput, MFU
    and load imbalance are averaged over time. Epoch and learning rate are those of the last step.
    """
    seconds, records, tokens = (sum(row[name] for row in rows) for name in ("seconds", "records", "tokens"))
    metrics = {name: rows[-1][name] for name in ("epoch", "learning_rate")}
    used = [row for row in rows if "skipped_because" not in row]
    if used:
        metrics["loss"] = sum(r["loss"] * r["records"] for r in used) / sum(r["records"] for r in used)
        metrics["grad_norm"] = sum(row["grad_norm"] for row in used) / len(used)
    metrics |= {"records_per_second": records / seconds, "tokens_per_second": tokens / seconds}
    if "mfu" in rows[-1]:
        metrics["mfu"] = sum(row["mfu"] * row["seconds"] for row in rows) / seconds
    if "load_imbalance" in rows[-1]:
        metrics["load_imbalance"] = sum(r["load_imbalance"] * r["seconds"] for r in rows) / seconds
    return metrics | {"max_memory_gb": max(row["max_memory_gb"] for row in rows)}


def format_line(step: int, total_steps: int, metrics: dict[str, float], seconds_left: float) -> str:
    """Format the metrics of an interval (from `average`) as a log line."""
    line = f"step {step}/{total_steps} ({100 * step / total_steps:.1f}%) | epoch {metrics['epoch']:.3f}"
    if "loss" in metrics:
        line += f" | loss {metrics['loss']:.4f}"
    line += f" | lr {metrics['learning_rate']:.1e}"
    if "grad_norm" in metrics:
        line += f" | grad norm {metrics['grad_norm']:.3g}"
    records, tokens = metrics["records_per_second"], metrics["tokens_per_second"]
    line += f" | {records:{'.3g' if records < 1000 else ',.0f'}} records/s, {tokens:,.0f} tokens/s"
    if "mfu" in metrics:
        line += f" | MFU {100 * metrics['mfu']:.0f}%"
    line += f" | {metrics['max_memory_gb']:.1f} GB"
    return line + (f" | {format_duration(seconds_left)} left" if step < total_steps else "")


def format_duration(seconds: float) -> str:
    """Format a duration: `1 h 18 min`, `18 min` or `40 s`."""
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min" if seconds >= 60 else f"{seconds:.0f} s"
