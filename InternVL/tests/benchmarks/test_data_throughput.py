"""The data benchmark runs, and its figures have names that programs can rely on."""

import json
import os
import subprocess
import sys

from helpers import HANG_SECONDS, SOURCE_ROOT


def test_figures_of_a_few_records(tmp_path):
    file = tmp_path / "figures.json"
    flags = [
        "--records",
        "2",
        "--max_dynamic_patch",
        "2",
        "--loader-workers",
        "0",
        "1",
        "--index-records",
        "30",
    ]
    result = subprocess.run(
        [sys.executable, str(SOURCE_ROOT / "benchmarks/data_throughput.py"), *flags, "--json", str(file)],
        capture_output=True, text=True, timeout=HANG_SECONDS,
        env={**os.environ, "PYTHONPATH": str(SOURCE_ROOT)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    figures = json.loads(file.read_text())
    assert figures["max_dynamic_patch"] == 2
    stages = {row["name"]: row for row in figures["stages"]}
    assert {
        "parse",
        "image headers",
        "tokenise",
        "encode whole",
        "decode images",
        "cut tiles",
    } <= stages.keys()
    assert {"loader, 0 workers", "loader, 1 workers"} <= stages.keys()
    assert {row["records"] for row in stages.values()} == {12}
    assert all(row["records_per_second"] > 0 for row in stages.values())
    assert [(row["name"], row["records"]) for row in figures["index"]] == [
        ("first time", 30),
        ("from cache", 30),
    ]
    assert all(row["peak_mb"] > 0 for row in figures["index"])
    assert "decode images" in result.stdout
