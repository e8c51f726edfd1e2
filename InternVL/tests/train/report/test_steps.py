"""Steps of a run in `metrics.jsonl`."""

import json

import numpy as np
import pytest

from internvl_chat.train.monitor.loss_curves import Curve
from internvl_chat.train.report.steps import count, mean_ends, parse_lines, read_steps_file


@pytest.fixture
def read(tmp_path):
    """Write lines, given as rows or text, and read them as steps."""

    def read(*lines):
        file = tmp_path / "metrics.jsonl"
        file.write_text("".join(x if isinstance(x, str) else json.dumps(x) + "\n" for x in lines))
        return read_steps_file(file)

    return read


def test_columns_and_datasets(read):
    sets = {"b": {"records": 1, "loss": 3.0}, "a": {"records": 3, "loss": 1.0}}
    steps, damaged = read(
        {"step": 1, "loss": 1.5, "records": 4, "sets": sets},
        {"step": 2, "loss": 2.0, "records": 1, "sets": {"a": {"records": 1, "loss": 2.0}}},
    )
    assert damaged == 0 and len(steps) == 2
    assert steps["loss"].tolist() == [1.5, 2.0] and np.isnan(steps["mfu"]).all()
    assert {name: curve.steps.tolist() for name, curve in steps.sets.items()} == {"a": [1, 2], "b": [1]}
    assert steps.sets["a"].losses.tolist() == [1.0, 2.0] and steps.sets["a"].records.tolist() == [3, 1]
    assert steps.loss.records.tolist() == [4, 1]


def test_repeated_steps_count_once(read):
    """After a crash, the steps since the checkpoint are repeated."""
    steps, _ = read(
        {"step": 1, "loss": 5.0},
        {"step": 2, "loss": 9.0, "sets": {"a": {"records": 1, "loss": 9.0}}, "skipped_because": "no tokens"},
        {"step": 2, "loss": 4.0, "sets": {"a": {"records": 1, "loss": 4.0}}},
    )  # fmt: skip
    assert steps["loss"].tolist() == [5.0, 4.0]
    assert steps.sets["a"].losses.tolist() == [4.0] and steps.skipped == {}


def test_skipped_steps_are_gaps(read):
    steps, _ = read(
        {"step": 1, "loss": 5.0, "grad_norm": 1.0},
        {"step": 2, "loss": 6.0, "grad_norm": None, "skipped_because": "the gradient norm is inf",
         "sets": {"a": {"records": 1, "loss": 6.0}}},
    )  # fmt: skip
    assert steps.skipped == {2: "the gradient norm is inf"}
    assert np.isnan(
        [steps.loss.losses[1], steps.curve("grad_norm").losses[1], steps.sets["a"].losses[0]]
    ).all()
    assert steps["loss"][1] == 6.0


@pytest.mark.parametrize(
    "line",
    ['{"step": 2, "lo', "[1]\n", "\xff\xfe\n", '{"loss": 1}\n', '{"step": "2"}\n', '{"step": -1}\n',
     '{"step": true}\n', '{"step": 2, "sets": [1]}\n', '{"step": 2, "sets": {"a": 5}}\n',
     "[" * 100_000 + "\n", f'{{"step": {"9" * 400}}}\n'],
)  # fmt: skip
def test_damaged_lines_are_counted(read, line):
    steps, damaged = read({"step": 1, "loss": 1.0}, line)
    assert (steps.step.tolist(), damaged) == ([1], 1)


def test_values_that_are_not_numbers(read):
    values = {"loss": "NaN", "seconds": '"fast"', "records": "null", "tokens": "true", "mfu": "Infinity",
              "grad_norm": "1e300", "learning_rate": "9" * 400}  # fmt: skip
    fields = ", ".join(f'"{name}": {value}' for name, value in values.items())
    steps, damaged = read(f'{{"step": 1, {fields}}}\n', "\n")
    assert damaged == 0
    assert all(np.isnan(steps[name]).all() for name in values)


def test_no_file(tmp_path):
    steps, damaged = read_steps_file(tmp_path / "none")
    assert (len(steps), len(steps.loss.steps), steps.sets, damaged) == (0, 0, {}, 0)


def test_only_lines_with_a_text(tmp_path):
    (tmp_path / "log").write_text('{"step": 1, "a": 1}\nbroken\n{"step": 2, "b": 1}\n')

    def step(row):
        return count(row["step"])

    assert parse_lines(tmp_path / "log", step, containing=b'"b"') == ([2], 0)
    assert parse_lines(tmp_path / "log", step) == ([1, 2], 1)


def test_mean_ends():
    steps = np.arange(100)
    assert mean_ends(Curve(steps, np.linspace(5, 1, 100), np.ones(100))) == pytest.approx((5, 1), abs=0.1)
    assert np.isnan(mean_ends(Curve(steps[:2], np.full(2, np.nan), np.ones(2)))).all()
