"""The plot of the loss."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from internvl_chat.train.monitor.plots import plot_loss


@pytest.mark.parametrize("steps", [1, 5, 300])
def test_plots_a_curve(tmp_path, steps):
    rows = [json.dumps({"step": i + 1, "loss": 7.0 / (i + 1)}) for i in range(steps)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as image:
        assert image.width > 500
        pixels = np.asarray(image.convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10


def test_no_steps_no_plot(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_without_matplotlib_there_is_a_warning(tmp_path, monkeypatch, caplog):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 5.0}\n')
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert "matplotlib is not installed" in caplog.text
    assert not (tmp_path / "loss.png").exists()


def test_validation_losses_are_plotted_too(tmp_path):
    rows = [json.dumps({"step": i + 1, "loss": 7.0 / (i + 1)}) for i in range(5)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    (tmp_path / "validation.jsonl").write_text('{"step": 2, "loss": 5.0}\n{"step": 4, "loss": null}\n')
    images = []
    for name, validation in (("without.png", None), ("with.png", tmp_path / "validation.jsonl")):
        plot_loss(tmp_path / "metrics.jsonl", tmp_path / name, validation)
        with Image.open(tmp_path / name) as image:
            images.append(np.asarray(image.convert("RGB")).reshape(-1, 3))
    orange = [(np.abs(pixels.astype(int) - (200, 100, 30)).sum(axis=1) < 30).sum() for pixels in images]
    assert orange[0] == 0 < orange[1]
