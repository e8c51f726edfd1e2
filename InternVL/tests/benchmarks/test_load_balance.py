"""The load-balance benchmark: rows by hand and a small run."""

import json

import numpy as np
import pytest

from benchmarks.load_balance import main, measure


def test_rows_by_hand():
    """Two ranks and records of costs 3 and 1: balanced perfectly; the file order only sometimes."""
    costs = np.array([3.0, 1.0] * 64)
    row = measure(np.full(128, 10), costs, 2, 128, packing=True)
    assert (row["balanced"], row["balanced_p99"]) == (1.0, 1.0)
    single = measure(np.full(4, 10), np.array([9.0, 1.0, 1.0, 1.0]), 2, 4, packing=False)
    assert single["balanced"] == pytest.approx(10 / 6)
    assert single["file_order"] == pytest.approx(10 / 6)


def test_small_run(sample_data, tiny_model, tmp_path, capsys):
    out = tmp_path / "balance.json"
    meta = str(sample_data / "train.json")
    assert main([meta, "--model", str(tiny_model), "--records", "512", "--ranks", "2",
                 "--out", str(out)]) == 0  # fmt: skip
    rows = json.loads(out.read_text())["rows"]
    assert [row["step_records"] for row in rows[::2]] == [16, 32, 64, 128, 256]
    assert all(1 <= row["balanced"] <= row["file_order"] for row in rows)
    assert "divided by the mean of all ranks" in capsys.readouterr().out
