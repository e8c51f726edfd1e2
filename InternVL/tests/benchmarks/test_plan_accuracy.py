"""The planning benchmark, and the calibration that the package derives from its results."""

import json

import pytest

from benchmarks.plan_accuracy import CALIBRATION, RESULTS, calibrate, compare, main

MEMORY_TOLERANCE, TIME_TOLERANCE = 0.15, 0.25


def test_package_has_the_calibration_of_the_committed_results():
    derived, stored = calibrate(RESULTS), json.loads(CALIBRATION.read_text())
    assert derived["efficiency"].keys() == stored["efficiency"].keys()
    for name, values in derived["efficiency"].items():
        found = stored["efficiency"][name]
        assert found.pop("source") == values.pop("source")
        assert found == pytest.approx(values, rel=1e-3)
    assert stored["cpu"] == derived["cpu"]


def test_gpu_results_are_used(tmp_path):
    row = {
        "preset": "fast", "recipe": "lora", "model": "small", "dtype": "bfloat16",
        "records_per_second": 8.0, "mfu": 0.3,
    }  # fmt: skip
    report = {"rows": [row], "hardware": "NVIDIA H100 80GB HBM3"}
    (tmp_path / "gpu.json").write_text(json.dumps(report))
    found = calibrate(tmp_path)["efficiency"]
    assert found["h100"]["measured"] and found["h100"]["source"] == "gpu.json"
    assert 0.3 < found["h100"]["compute"] < 0.33  # a step takes 2 s, 0.04 s of it overhead
    assert not found["cuda"]["measured"]


def test_committed_results_are_predicted_within_tolerance():
    reports = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("plan-*.json"))]
    rows = compare(reports)
    assert {row["layout"] for row in rows} == {"single", "ddp", "fsdp", "zero1", "zero2", "zero3"}
    for row in rows:
        key = tuple(row[name] for name in ("model", "recipe", "dtype", "layout"))
        assert abs(row["memory_error"]) <= MEMORY_TOLERANCE, key
        assert abs(row["time_error"]) <= TIME_TOLERANCE, key


@pytest.mark.slow
def test_measurement(tmp_path):
    out = tmp_path / "plan.json"
    argv = ["--model", "smoke", "--recipes", "full", "--layouts", "single,fsdp", "--steps", "1"]
    assert main([*argv, "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["layout"], row["ranks"]) for row in rows] == [("single", 1), ("fsdp", 2)]
    assert all(row["measured_seconds"] > 0 and row["planned_gb"] > 0 for row in rows)
