"""The chaos benchmark at its smallest: a run that is killed twice ends as one that nobody disturbed."""

import json
import subprocess
import sys

import pytest
from helpers import HANG_SECONDS, SOURCE_ROOT


@pytest.mark.slow
def test_two_kills_leave_no_trace(tmp_path):
    script, out = SOURCE_ROOT / "benchmarks/chaos.py", tmp_path / "chaos.json"
    command = [sys.executable, str(script), "--kills", "2", "--folder", str(tmp_path / "work")]
    result = subprocess.run(
        [*command, "--json", str(out)], capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert result.returncode == 0, result.stderr
    figures = json.loads(out.read_text())["figures"]
    assert (figures["kills"], figures["damaged_loaded"]) == (2, 0)
    assert figures["starts"] >= 3
    assert figures["same_ledger"] and figures["same_losses"] and figures["same_weights"]
