"""The checkpoint benchmark: summary, and a small run."""

import json

import pytest

from benchmarks.checkpoint_overhead import main, summarize


def test_summary_of_steps_after_a_save() -> None:
    """A checkpoint is saved after every third step; the first two steps are warm-up."""
    seconds = [9.0, 5.0, 1.0, 1.5, 1.0, 1.0, 2.5, 1.0, 1.0]
    row = summarize("background", seconds, every=3, warmup=2, size=2_000_000_000)
    assert row.after_save_seconds == [1.5, 2.5]
    assert (row.median_seconds, row.checkpoint_gb) == (1.0, 2.0)
    assert row.ratio == pytest.approx(2.0) and row.worst_ratio == pytest.approx(2.5)
    assert row.seconds_a_save == pytest.approx((0.5 + 1.5) / 2)


@pytest.mark.parametrize("recipe", ["lora", "full"])
def test_both_modes(tmp_path, recipe: str, capsys) -> None:
    out = tmp_path / "rows.json"
    options = ["--recipe", recipe, "--model", "smoke", "--device", "cpu", "--steps", "5", "--every", "2"]
    assert main([*options, "--warmup", "0", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["mode"] for row in rows] == ["background", "synchronous"]
    assert all(len(row["after_save_seconds"]) == 2 and row["median_seconds"] > 0 for row in rows)
    assert rows[0]["checkpoint_gb"] == pytest.approx(rows[1]["checkpoint_gb"], rel=0.01)
    assert capsys.readouterr().out.count(", after a save ") == 2
