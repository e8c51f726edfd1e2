"""The benchmark of the data browser: a small run and its JSON report."""

import json

import pytest

from benchmarks.browse_latency import REQUESTS, main


@pytest.mark.slow
def test_report_of_a_few_records(tmp_path, capsys):
    file = tmp_path / "report.json"
    assert main(["--records", "60", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert report["records"] == 60 and [row["name"] for row in report["rows"]] == [
        "not indexed",
        "index cached",
    ]
    for row in report["rows"]:
        assert row.keys() == {"name", "opening", "index complete", *REQUESTS}
        assert row["index complete"] >= row["opening"] > 0
    assert "record page" in capsys.readouterr().out
