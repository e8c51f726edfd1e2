"""The storage benchmark: a small run and its JSON report."""

import json
import os
from unittest import mock

from s3_server import forget_connections, require_packages

from benchmarks.storage_throughput import main


def test_report_of_a_few_records(tmp_path, capsys):
    require_packages()
    forget_connections()
    with mock.patch.dict(os.environ):  # the benchmark sets variables
        assert main(["--records", "1", "--json", str(tmp_path / "report.json")]) == 0
    forget_connections()
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    names = [
        f"S3 {kind}, {when}" for kind in ("objects", "shards") for when in ("first time", "from the cache")
    ]
    assert [row["name"] for row in rows] == ["folder", "tar shards", *names]
    assert {row["records"] for row in rows} == {6}
    assert all(row["records_per_second"] > 0 for row in rows)
    assert "from the cache" in capsys.readouterr().out
