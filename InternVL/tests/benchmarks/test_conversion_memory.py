"""The conversion benchmark: a small run and its errors."""

import json

import pytest

from benchmarks.conversion_memory import main, measure, write_adapter
from benchmarks.shapes import SHAPES
from internvl_chat.model.io.checkpoint import load_model
from internvl_chat.model.lora.injection import lora_layers


def test_both_commands(tmp_path, capsys) -> None:
    out = tmp_path / "rows.json"
    options = ["--model", "smoke", "--check", "False", "--folder", str(tmp_path), "--json", str(out)]
    assert main(options) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["work"], row["checked"], row["shards"]) for row in rows] == [
        ("merge", False, 1),
        ("export", False, 1),
    ]
    # More than torch alone, and less than the next larger model.
    assert all(0.1 < row["peak_memory_gb"] < 4 for row in rows)
    assert capsys.readouterr().out.splitlines()[1].startswith("merge")
    assert list(tmp_path.iterdir()) == [out]


def test_adapters_match_the_recipe(tmp_path) -> None:
    adapter = write_adapter(tmp_path, SHAPES["smoke"])
    layers = lora_layers(load_model(adapter, image_context_id=0))
    assert len(layers) == 2 * 7
    assert all(layer.r["default"] == 16 and layer.lora_B["default"].weight.any() for layer in layers.values())


def test_failing_command_is_reported(tmp_path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)m3llm merge failed with exit code 1:.*nowhere"):
        measure("merge", tmp_path / "nowhere", tmp_path, "False")


def test_unknown_command(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--works", "merge,fold"])
    assert "unknown: fold" in capsys.readouterr().err
