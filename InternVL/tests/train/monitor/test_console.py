"""Console output: averages of an interval in one line, and a progress bar only on a terminal."""

import io
import logging
import sys

import pytest

from internvl_chat.train.monitor.console import Console, average, format_duration, format_line
from internvl_chat.utils.logging import configure_logging


def row(step=1, **changes):
    return {
        "step": step, "epoch": step / 1000, "loss": 2.0, "grad_norm": 1.0, "learning_rate": 1e-6 * step,
        "records": 4, "tokens": 1000, "supervised_tokens": 100, "tiles": 4, "seconds": 2.0,
        "pause_seconds": 0.0, "records_per_second": 2.0, "tokens_per_second": 500.0, "mfu": 0.4,
        "max_memory_gb": 10.0,
    } | changes  # fmt: skip


def test_format_line():
    metrics = {
        "epoch": 0.01346, "learning_rate": 4.9e-6, "loss": 1.23449, "grad_norm": 0.8213,
        "records_per_second": 3.1, "tokens_per_second": 2789.9, "mfu": 0.4099, "max_memory_gb": 61.24,
    }  # fmt: skip
    assert format_line(200, 14860, metrics, 4680) == (
        "step 200/14860 (1.3%) | epoch 0.013 | loss 1.2345 | lr 4.9e-06 | grad norm 0.821 | 3.1 records/s, "
        "2,790 tokens/s | MFU 41% | 61.2 GB | 1 h 18 min left"
    ).replace("1.2345", f"{1.23449:.4f}")


def test_format_line_without_optional_metrics():
    line = format_line(10, 10, average([row(10, skipped_because="the loss is nan")]) | {"mfu": 0.5}, 0)
    assert "loss" not in line and "grad norm" not in line and "left" not in line
    without = row()
    del without["mfu"]
    assert "MFU" not in format_line(1, 2, average([without]), 3)


def test_averages():
    """The loss is (1 * 2 + 4 * 6) / 8; MFU is weighted by time."""
    rows = [
        row(1, loss=1.0, records=2, tokens=100, seconds=1.0, grad_norm=0.5, mfu=0.2, max_memory_gb=11.0),
        row(2, loss=4.0, records=6, tokens=700, seconds=3.0, grad_norm=1.5, mfu=0.4),
        row(
            3,
            loss=float("nan"),
            records=4,
            tokens=200,
            seconds=1.0,
            mfu=0.4,
            skipped_because="the loss is nan",
        ),
    ]
    assert average(rows) == pytest.approx({
        "epoch": 0.003, "learning_rate": 3e-6, "loss": 3.25, "grad_norm": 1.0, "records_per_second": 2.4,
        "tokens_per_second": 200.0, "mfu": (0.2 + 1.2 + 0.4) / 5, "max_memory_gb": 11.0,
    })  # fmt: skip


def test_load_imbalance_is_averaged_over_time():
    rows = [row(1, seconds=1.0, load_imbalance=1.5), row(2, seconds=3.0, load_imbalance=1.1)]
    assert average(rows)["load_imbalance"] == pytest.approx(1.2)


def test_a_line_covers_the_steps_since_the_last(caplog):
    console = Console(100, first_step=1, show_bar=False)
    with caplog.at_level(logging.INFO):
        assert console.step(row(1, loss=1.0), due=False) is None
        assert console.step(row(2, loss=3.0), due=True)["loss"] == 2.0
        assert console.step(row(3, loss=7.0))["loss"] == 7.0
    console.close()
    assert [record.getMessage().split(" |")[0] for record in caplog.records] == [
        "step 2/100 (2.0%)",
        "step 3/100 (3.0%)",
    ]
    assert "3 min left" in caplog.text  # 98 and 97 steps of 2 s


def test_time_left_includes_pauses(caplog):
    """98 steps of 2 s and a pause of 12 s every second step."""
    console = Console(100, first_step=1, show_bar=False)
    console.step(row(1), due=False)
    with caplog.at_level(logging.INFO):
        metrics = console.step(row(2, pause_seconds=12.0))
    console.close()
    assert f"{format_duration(98 * (2 + 6))} left" in caplog.text
    assert metrics["records_per_second"] == 2.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (60, "1 min"), (1080, "18 min"), (3599, "1 h 0 min"), (4680, "1 h 18 min"),
     (360_000, "100 h 0 min")],
)  # fmt: skip
def test_durations(seconds, text):
    assert format_duration(seconds) == text


class Terminal(io.StringIO):
    """A stderr that may be a terminal."""

    def __init__(self, is_terminal):
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self):
        return self.is_terminal


@pytest.fixture
def package_logger():
    logger = logging.getLogger("internvl_chat")
    before = logger.handlers[:], logger.level, logger.propagate
    yield logger
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.mark.parametrize(("is_terminal", "show_bar"), [(True, True), (True, False), (False, True)])
def test_a_bar_on_a_terminal_only(monkeypatch, package_logger, is_terminal, show_bar):
    stream = Terminal(is_terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    configure_logging()
    handlers = package_logger.handlers[:]
    console = Console(5, first_step=3, show_bar=show_bar)
    for step in (3, 4, 5):
        console.step(row(step), due=step != 4)
    console.close()
    written = stream.getvalue()
    has_bar = is_terminal and show_bar
    assert ("\r" in written) == ("5/5 [" in written) == has_bar
    assert written.count("INFO step ") == 2
    if not has_bar:
        assert written.count("\n") == 2
    assert package_logger.handlers == handlers
