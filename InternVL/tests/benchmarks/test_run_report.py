"""The benchmark of the run report: a short run."""

import json

from benchmarks.run_report import main


def test_short_run(tmp_path):
    out = tmp_path / "results.json"
    assert main(["--steps", "30", "--repeats", "1", "--json", str(out)]) == 0
    results = json.loads(out.read_text())
    assert results["steps"] == 30 and results["report_mb"] > 4
    assert all(seconds > 0 for seconds in results["write_seconds"] + results.get("first_chart_seconds", []))
