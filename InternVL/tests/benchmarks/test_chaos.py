"""The chaos benchmark with two kills."""

import json
import subprocess
import sys

import pytest
from helpers import HANG_SECONDS, SOURCE_ROOT

from benchmarks.chaos import resumed_from

LOG = """\
10:00:00 INFO resuming from /out/checkpoint-2
10:00:09 WARNING skipping checkpoint /out/checkpoint-8: the content of config.json has changed
10:00:09 INFO resuming from /out/checkpoint-6
10:00:10 WARNING resuming from step 6: deleting /out/checkpoint-8
"""


def test_checkpoint_of_the_last_start(tmp_path):
    (tmp_path / "training_log.txt").write_text(LOG)
    assert resumed_from(tmp_path, 1) == "checkpoint-6"
    assert resumed_from(tmp_path, 4) is None


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
