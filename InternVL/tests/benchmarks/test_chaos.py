"""The chaos benchmark with two kills."""

import json
import subprocess
import sys

import pytest
from helpers import HANG_SECONDS, SOURCE_ROOT


@pytest.mark.slow
def test_killed_run_is_identical(tmp_path):
    script, out = SOURCE_ROOT / "benchmarks/chaos.py", tmp_path / "chaos.json"
    command = [sys.executable, str(script), "--kills", "2", "--folder", str(tmp_path / "work")]
    result = subprocess.run(
        [*command, "--json", str(out)], capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert result.returncode == 0, result.stderr
    outcome = json.loads(out.read_text())["figures"]
    assert (outcome["kills"], outcome["damaged_loaded"]) == (2, 0)
    assert outcome["starts"] >= 3
    assert outcome["same_ledger"] and outcome["same_losses"] and outcome["same_weights"]
