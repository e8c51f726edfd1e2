"""The scaling benchmark: a small run."""

import json

from benchmarks.scaling import main
from benchmarks.shapes import default_dtype


def test_one_quantity_grows_at_a_time(tmp_path):
    out = tmp_path / "rows.json"
    options = ["--model", "smoke", "--largest", "128", "--repeats", "1", "--device", "cpu", "--processes"]
    assert main([*options, "--json", str(out)]) == 0
    written = json.loads(out.read_text())
    rows = written["rows"]
    assert written["dtype"] == default_dtype("cpu")
    numbers = {}
    for row in rows:
        numbers.setdefault(row["against"], []).append(row["number"])
    assert numbers["tokens"] == [16, 32, 64, 128]
    assert numbers["records"] == [1, 2, 4, 8]
    assert numbers["tiles"][:3] == [1, 2, 4]
    for kind in ("tokens", "records", "tiles"):
        operations = [row["gflop"] for row in rows if row["against"] == kind]
        assert operations == sorted(operations)
    assert all(row["seconds"] > 0 for row in rows if "seconds" in row)
