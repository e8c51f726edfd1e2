"""The data benchmark: a small run and its JSON report."""

import json

from benchmarks.data_throughput import main


def test_report_of_a_few_records(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # as the benchmark sets it
    file = tmp_path / "report.json"
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
    assert main([*flags, "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert report["max_dynamic_patch"] == 2
    stages = {row["name"]: row for row in report["stages"]}
    assert {
        "parse",
        "image headers",
        "tokenize",
        "encode",
        "decode images",
        "split into tiles",
    } <= stages.keys()
    assert {"dataloader, 0 workers", "dataloader, 1 workers"} <= stages.keys()
    assert {row["records"] for row in stages.values()} == {12}
    assert all(row["records_per_second"] > 0 for row in stages.values())
    assert [(row["name"], row["records"]) for row in report["index"]] == [
        ("first time", 30),
        ("from cache", 30),
    ]
    assert all(row["peak_mb"] > 0 for row in report["index"])
    assert "decode images" in capsys.readouterr().out
