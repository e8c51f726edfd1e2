"""Reading of output folders."""

import json
from pathlib import Path

import numpy as np
import pytest
from run_files import NAME, SCRIPT, complete_run, sample, session, write_lines

from internvl_chat.train.report.run import ALL, UnusableRecord, check_run_folders, read_run
from internvl_chat.utils.errors import UsageError


def test_complete_run(tmp_path):
    run = read_run(complete_run(tmp_path / "run"))
    assert run.problems == [] and run.finished
    assert (run.last_step, run.total_steps) == (40, 40)
    assert [session.step for session in run.sessions] == [0, 20]
    assert run.flags == {"learning_rate": 5e-6, "use_llm_lora": 16, "unknown": [1]}
    assert run.unusable == [UnusableRecord(0, NAME, 7, f"no image {SCRIPT}")]
    assert [(s.step, s.answer, s.truncated) for s in run.samples] == [
        (20, f"bottom {SCRIPT}", True), (40, "Top left", False),
    ]  # fmt: skip
    assert [message.count for message in run.messages] == [1, 2]
    steps, losses = run.validation_curve(NAME, "loss")
    assert steps.tolist() == list(range(1, 41)) and np.isfinite(losses).all()
    assert run.lowest_loss(ALL).endswith("at step 40")
    assert run.lowest_loss("none") == "-"


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "sessions.jsonl", "train_results.json"])
def test_a_single_file_is_enough(tmp_path, name):
    (tmp_path / name).write_text("")
    check_run_folders([tmp_path])
    run = read_run(tmp_path)
    assert (run.last_step, run.total_steps, run.unusable, run.messages) == (0, None, [], [])


def test_damage_is_reported_and_ignored(tmp_path):
    complete_run(tmp_path)
    damage = ['{"step": 1, "lo\n', "5\n", '{"step": -1}\n']
    for name in ("metrics", "validation", "samples", "sessions"):
        write_lines(tmp_path / f"{name}.jsonl", *damage)
    write_lines(tmp_path / "ledger.jsonl", '{"step": 4, "skipped": 5}\n')
    write_lines(tmp_path / "samples.jsonl", sample(40, "x", images=5))
    write_lines(tmp_path / "sessions.jsonl", session(data=[{"records": 5}]), session(versions=None))
    (tmp_path / "config.yaml").write_bytes(b"a: [\xff")
    run = read_run(tmp_path)
    assert run.problems == [
        "metrics.jsonl: 3 damaged lines ignored", "validation.jsonl: 3 damaged lines ignored",
        "samples.jsonl: 4 damaged lines ignored", "sessions.jsonl: 5 damaged lines ignored",
        "config.yaml: damaged, ignored",
    ]  # fmt: skip
    assert (len(run.steps), len(run.validations), len(run.samples), len(run.sessions)) == (40, 40, 2, 2)
    assert run.flags == {} and run.finished


def test_repeated_validations_and_samples_count_once(tmp_path):
    row = {"step": 5, "records": 1, "loss": 2.0, "em": None, "sets": {}}
    write_lines(tmp_path / "validation.jsonl", row, row | {"loss": 1.0})
    write_lines(tmp_path / "samples.jsonl", sample(5, "a"), sample(5, "b"), sample(5, "c", index=4))
    run = read_run(tmp_path)
    assert run.validation_curve(ALL, "loss")[1].tolist() == [1.0]
    assert np.isnan(run.validation_curve(ALL, "em")[1]).all()
    assert [s.answer for s in run.samples] == ["b", "c"]


def test_all_wrong_folders_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    folders = [tmp_path, tmp_path / "none", tmp_path / "file"]
    with pytest.raises(UsageError) as error:
        check_run_folders(folders)
    assert error.value.problems == [
        f"{tmp_path}: contains no run (no config.yaml or metrics.jsonl); pass the OUTPUT_DIR of a run",
        *(f"{folder}: no such folder; pass the OUTPUT_DIR of a run" for folder in folders[1:]),
    ]


def test_ledger_of_trained_records_only(tmp_path):
    rows = [{"step": step, "epoch": 0, "trained": [["a", step]]} for step in range(1, 5)]
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_run(Path(tmp_path)).unusable == []
