"""Plot the loss of a run."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)


def plot_loss(metrics: Path, output: Path, validation: Path | None = None) -> None:
    """Plot the loss of a run, its moving average and the validation loss.

    Args:
        metrics: path of `metrics.jsonl`; without steps nothing is plotted.
        output: PNG file to write.
        validation: path of `validation.jsonl`; may be missing.
    """
    try:
        import matplotlib
    except ImportError:
        logger.warning("%s: not plotted: matplotlib is not installed", output)
        return

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps, losses = _losses(_rows(metrics))
    if not len(steps):
        return
    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    axes.plot(steps, losses, color="#9ec3e6", linewidth=1, label="step")
    window = max(1, min(len(losses) // 10, 100))
    if window > 1:
        mean = np.convolve(losses, np.ones(window) / window, mode="valid")
        axes.plot(steps[window - 1 :], mean, color="#1f5a96", linewidth=2, label=f"mean of {window} steps")
    steps, losses = _losses(_rows(validation) if validation else [])
    if len(steps):
        axes.plot(steps, losses, "o-", color="#c8641e", linewidth=1.5, markersize=4, label="validation")
    if len(axes.lines) > 1:
        axes.legend(frameon=False)
    axes.set(xlabel="optimizer step", ylabel="loss", title=f"{output.parent.name}", ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.savefig(output, dpi=120)
    plt.close(figure)


def _rows(file: Path) -> list[dict[str, Any]]:
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines]


def _losses(rows: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps and their losses."""
    return np.array([row["step"] for row in rows]), np.array([row["loss"] for row in rows], float)
