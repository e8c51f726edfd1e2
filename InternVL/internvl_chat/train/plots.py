"""The picture of a run's loss."""

import json
from pathlib import Path

import numpy as np


def plot_loss(metrics: Path, picture: Path) -> None:
    """Draw the loss of every step, and its running mean, from `metrics.jsonl` as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    rows = [json.loads(line) for line in lines]
    if not rows:
        return
    steps, losses = (np.array([row[key] for row in rows]) for key in ("step", "loss"))
    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    axes.plot(steps, losses, color="#9ec3e6", linewidth=1, label="each step")
    window = max(1, min(len(losses) // 10, 100))
    if window > 1:
        mean = np.convolve(losses, np.ones(window) / window, mode="valid")
        axes.plot(steps[window - 1 :], mean, color="#1f5a96", linewidth=2, label=f"mean of {window} steps")
        axes.legend(frameon=False)
    axes.set(xlabel="optimizer step", ylabel="loss", title=f"{picture.parent.name}", ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)
    plt.close(figure)
