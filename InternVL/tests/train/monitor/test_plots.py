"""The contents of the loss plot."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from internvl_chat.train.monitor.plots import loss_figure, plot_loss
from internvl_chat.utils.plotting import save_png


def metrics(losses, *, sets=("a",), skipped=()):
    """Return metrics rows with the given losses; the losses of dataset n are n higher."""
    rows = []
    for step, loss in enumerate(losses, 1):
        parts = {name: {"records": 4, "loss": loss + number} for number, name in enumerate(sets)}
        row = {"step": step, "loss": loss, "records": 8, "learning_rate": 1e-5 / step, "sets": parts}
        rows.append(row | ({"skipped_because": "the loss is nan"} if step in skipped else {}))
    return rows


def line(axes, label):
    """Return the x and y values of the only line whose label starts with `label`."""
    [found] = [each for each in axes.lines if each.get_label().startswith(label)]
    return list(found.get_xdata()), list(found.get_ydata())


def labels(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_loss_mean_and_learning_rate():
    losses = list(np.linspace(5, 1, 80))
    loss, rate = loss_figure(metrics(losses), [], title="run").axes
    assert line(loss, "loss of a step") == (list(range(1, 81)), losses)
    steps, mean = line(loss, "mean of 5 steps: 1.051 at the end")
    assert steps == list(range(1, 81))
    assert mean[:-2] == pytest.approx(losses[:-2])
    assert rate.lines[0].get_ydata() == pytest.approx([1e-5 / step for step in steps])
    assert 0 < loss.get_ylim()[0] < 1 and 5 < loss.get_ylim()[1] < 5.5
    assert loss.get_xlim()[0] < 1 and loss.get_xlim()[1] > 80


@pytest.mark.parametrize("steps", [1, 5])
def test_few_steps_have_markers_and_no_mean(steps):
    figure = loss_figure(metrics([3.0 - i / 10 for i in range(steps)], sets="ab"), [], title="run")
    loss, sets, _ = figure.axes
    assert labels(loss) == ["loss of a step"]
    assert loss.lines[0].get_marker() == "o"
    assert all(each.get_marker() == "." for each in sets.lines)
    figure.draw_without_rendering()
    ticks = [tick for tick in loss.get_xticks() if loss.get_xlim()[0] <= tick <= loss.get_xlim()[1]]
    assert ticks == list(range(1, steps + 1))


def test_long_runs_can_be_drawn(tmp_path):
    """As many steps as full training; matplotlib cannot simplify a noisy line."""
    losses = np.random.default_rng(0).random(370_000)
    save_png(loss_figure(metrics(losses, sets=()), [], title="run"), tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_spikes_are_marked_at_the_edge_and_not_in_the_mean():
    losses = np.linspace(2.5, 2.0, 200)
    losses[100] = 60.0
    axes = loss_figure(metrics(losses), [], title="run").axes[0]
    assert line(axes, "above the axis (1)") == ([101], [1])
    assert axes.get_ylim()[1] < 3
    assert max(line(axes, "mean of")[1]) < 2.51


def test_skipped_steps_are_gaps_with_a_mark():
    losses = [3.0, 2.9, float("nan"), 2.7, 2.6, 99.0] + [2.5] * 10
    axes = loss_figure(metrics(losses, skipped=(3, 6)), [], title="run").axes[0]
    assert line(axes, "skipped (2)") == ([3, 6], [0, 0])
    _, drawn = line(axes, "loss of a step")
    assert np.isnan([drawn[2], drawn[5]]).all()
    assert axes.get_ylim()[1] < 3.1
    assert np.isfinite(line(axes, "mean of")[1]).all()


def test_run_of_skipped_steps_only():
    axes = loss_figure(metrics([float("nan")] * 3, skipped=(1, 2, 3)), [], title="run").axes[0]
    assert line(axes, "skipped (3)")[0] == [1, 2, 3]


def test_validation_points():
    validation = [
        {"step": step, "loss": loss, "sets": {"a": {"loss": loss}, "b": {"loss": loss and loss + 1}}}
        for step, loss in ((0, 9.0), (20, 4.5), (40, None))
    ]
    loss, sets, _ = loss_figure(metrics(np.linspace(5, 4, 40), sets="ab"), validation, title="run").axes
    steps, drawn = line(loss, "validation: 4.500 at the end")
    assert steps == [0, 20, 40] and drawn[:2] == [9.0, 4.5]
    assert loss.get_ylim()[1] > 9 and loss.get_xlim()[0] < 0
    circles = [each for each in sets.lines if each.get_marker() == "o" and len(each.get_xdata())]
    assert [list(each.get_ydata()[:2]) for each in circles] == [[9.0, 4.5], [10.0, 5.5]]
    # Training and validation of a dataset have the same color.
    assert [each.get_color() for each in circles] == [each.get_color() for each in sets.lines[:4:2]]


def test_curves_of_datasets():
    names = [f"set-{number:02}$" for number in range(14)]
    rows = metrics([3.0] * 20, sets=names)
    for row in rows[1::2]:
        del row["sets"]["set-00$"]
    axes = loss_figure(rows, [], title="run").axes[1]
    assert labels(axes) == [name.replace("$", r"\$") for name in names]
    styles = {(each.get_color(), each.get_linestyle()) for each in axes.lines}
    assert len(styles) == len(names)
    assert list(axes.lines[0].get_xdata()) == list(range(1, 21, 2))
    assert all(each.get_ydata() == pytest.approx(3 + n) for n, each in enumerate(axes.lines))


def test_logs_of_earlier_versions_have_no_datasets():
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    assert len(loss_figure(rows, [], title="run").axes) == 2


def test_title_is_the_run_name():
    axes = loss_figure(metrics([1.0] * 12), [], title="my$run", subtitle="InternVL3-8B, LoRA").axes[0]
    assert axes.get_title("left") == r"my\$run"
    assert axes.texts[0].get_text() == "12 steps · InternVL3-8B, LoRA"


def write(folder, rows):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "metrics.jsonl"


def test_file_is_an_image(tmp_path):
    plot_loss(write(tmp_path, metrics([5.0, 4.0, 3.0])), tmp_path / "loss.png", tmp_path / "validation.jsonl")
    with Image.open(tmp_path / "loss.png") as image:
        assert image.width > 1000
        assert len(image.convert("RGB").getcolors(1 << 24)) > 10


def test_no_steps_no_plot(tmp_path):
    plot_loss(write(tmp_path, []), tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_without_matplotlib_there_is_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    plot_loss(write(tmp_path, metrics([5.0])), tmp_path / "loss.png")
    assert "matplotlib is not installed" in caplog.text
    assert not (tmp_path / "loss.png").exists()
