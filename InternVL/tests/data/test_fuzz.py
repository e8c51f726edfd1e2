"""Randomly corrupted input: correct results or errors that name the record, fast and in little memory."""

import json
import random
import resource

import pytest
from fuzzing import fuzz_images, fuzz_metas, fuzz_records, mutate_bytes, mutate_value, valid_record
from small_sets import entry_of

from internvl_chat.cli import main as m3llm

MAX_MEMORY = 2e9

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


def test_records(folder):
    outcomes = fuzz_records(folder, seed=0, count=400)
    assert len(outcomes) >= 8
    assert outcomes["good"] > 40


def test_images(folder):
    outcomes = fuzz_images(folder, seed=0, count=150)
    assert outcomes["good"] > 10
    assert outcomes["image unreadable"] > 10


def test_metas(folder):
    outcomes = fuzz_metas(folder, seed=0, count=100)
    assert min(outcomes.values()) > 10


@pytest.mark.parametrize("seed", range(4))
def test_command(folder, seed, capfd):
    """Corrupted data gives an exit code and a message, never a traceback."""
    rng = random.Random(seed)
    lines = [mutate_bytes(rng, json.dumps(mutate_value(rng, valid_record(rng))).encode()) for _ in range(40)]
    (folder / "qa.jsonl").write_bytes(b"\n".join(lines))
    (folder / "meta.json").write_text(json.dumps({"a": entry_of(folder)}))
    argv = ["data", "check", str(folder / "meta.json"), "--report", str(folder / "report"), "--check", "full"]
    assert m3llm([*argv, "--against", str(folder / "images")]) == 1
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err
    for line in (folder / "report/problems.jsonl").read_text(encoding="utf-8").splitlines():
        assert json.loads(line)["kind"]


@pytest.mark.slow
def test_ten_thousand_inputs(folder):
    total = 0
    for seed in range(1, 13):
        for fuzz, count in ((fuzz_records, 700), (fuzz_images, 250), (fuzz_metas, 120)):
            total += sum(fuzz(folder, seed, count).values())
    assert total > 10_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < MAX_MEMORY
