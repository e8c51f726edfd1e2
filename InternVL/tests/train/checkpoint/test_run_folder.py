"""Inspection and preparation of output folders."""

import json

import pytest

from internvl_chat.train.checkpoint.manifest import write_manifest
from internvl_chat.train.checkpoint.run_folder import (
    FINISHED,
    LEDGER,
    METRICS,
    REPORT,
    SAMPLES,
    SESSIONS,
    inspect_output_folder,
    list_checkpoints,
    lock_folder,
)
from internvl_chat.utils.errors import UsageError


def write_checkpoint(folder, step, complete=True):
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    if complete:
        (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        write_manifest(checkpoint)
    return checkpoint


def write_steps(file, steps):
    file.write_text("".join(json.dumps({"step": step}) + "\n" for step in steps))


def inspect(folder, overwrite=False, resume=None):
    return inspect_output_folder(folder, overwrite=overwrite, resume=resume)


@pytest.mark.parametrize("existing", [[], ["training_log.txt"], ["metrics.jsonl", "config.yaml", ".lock"]])
def test_starts_a_new_run_if_nothing_would_be_lost(tmp_path, existing):
    for name in existing:
        (tmp_path / name).write_text("")
    found = inspect(tmp_path)
    assert (found.resume, found.overwrite) == (None, False)
    with found.open():
        assert {p.name for p in tmp_path.iterdir()} == {".lock", *existing} - {"metrics.jsonl", "config.yaml"}


def test_missing_folder_is_created_on_open(tmp_path):
    found = inspect(tmp_path / "a/b")
    assert not (tmp_path / "a").exists()
    found.open().release()
    assert (tmp_path / "a/b").is_dir()


def test_resumes_the_newest_intact_checkpoint(tmp_path):
    for step in (8, 10, 9):
        write_checkpoint(tmp_path, step)
    write_checkpoint(tmp_path, 12, complete=False)
    names = [p.name for p in list_checkpoints(tmp_path)]
    assert names == ["checkpoint-8", "checkpoint-9", "checkpoint-10", "checkpoint-12"]
    assert inspect(tmp_path).resume == tmp_path / "checkpoint-10"


def test_resuming_truncates_the_logs(tmp_path):
    write_checkpoint(tmp_path, 2)
    write_steps(tmp_path / METRICS, [1, 2, 3])
    write_steps(tmp_path / SESSIONS, [0, 3])
    write_steps(tmp_path / SAMPLES, [2, 2, 3])
    (tmp_path / LEDGER).write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "trai')  # truncated by a crash
    (tmp_path / ".partial").mkdir()
    inspect(tmp_path).open().release()
    assert (tmp_path / METRICS).read_text() == '{"step": 1}\n{"step": 2}\n'
    assert (tmp_path / LEDGER).read_text() == '{"step": 1}\n{"step": 2}\n'
    assert (tmp_path / SESSIONS).read_text() == '{"step": 0}\n'
    assert (tmp_path / SAMPLES).read_text() == '{"step": 2}\n{"step": 2}\n'
    assert not (tmp_path / ".partial").exists()


def test_finished_run_is_rejected(tmp_path):
    write_checkpoint(tmp_path, 2)
    (tmp_path / FINISHED).write_text("{}")
    with pytest.raises(UsageError, match="contains a finished run"):
        inspect(tmp_path)
    assert inspect(tmp_path, resume="auto").resume == tmp_path / "checkpoint-2"


def test_foreign_files_are_not_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"in use \(it contains thesis.txt\)"):
        inspect(tmp_path)


def test_overwriting_deletes_only_the_run(tmp_path):
    write_checkpoint(tmp_path, 2)
    for name in (
        METRICS,
        FINISHED,
        REPORT,
        SAMPLES,
        SESSIONS,
        "model.safetensors",
        "thesis.txt",
        "vocab.json",
    ):
        (tmp_path / name).write_text("")
    inspect(tmp_path, overwrite=True).open().release()
    assert {p.name for p in tmp_path.iterdir()} == {".lock", "thesis.txt"}


def test_resume_must_exist(tmp_path):
    with pytest.raises(UsageError, match="cannot resume: no such folder"):
        inspect(tmp_path, resume=str(tmp_path / "checkpoint-1"))
    with pytest.raises(UsageError, match="contains no checkpoint"):
        inspect(tmp_path, resume="True")
    assert inspect(tmp_path, resume="auto").resume is None


def test_overwriting_and_resuming_are_mutually_exclusive(tmp_path):
    with pytest.raises(UsageError, match="remove one of the flags"):
        inspect(tmp_path, overwrite=True, resume="auto")


def test_lock_is_exclusive_until_released(tmp_path):
    lock = lock_folder(tmp_path)
    with pytest.raises(UsageError, match="another run"):
        lock_folder(tmp_path)
    lock.release()
    lock_folder(tmp_path).release()


def test_folder_without_a_run_is_never_overwritten(tmp_path):
    for name in ("annotations.jsonl", "labels.json", "analysis.py", "vocab.json"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match="contains no training run"):
        inspect(tmp_path, overwrite=True)
    (tmp_path / METRICS).write_text("")
    inspect(tmp_path, overwrite=True).open().release()
    assert {p.name for p in tmp_path.iterdir()} == {
        ".lock",
        "annotations.jsonl",
        "labels.json",
        "analysis.py",
    }


def test_inputs_are_never_overwritten(tmp_path):
    (tmp_path / METRICS).write_text("")
    for needed in (tmp_path, tmp_path / "checkpoint-2"):
        with pytest.raises(UsageError, match="which this run reads"):
            inspect_output_folder(tmp_path, overwrite=True, resume=None, inputs=[needed])


def test_run_is_not_resumed_in_the_folder_of_another_run(tmp_path):
    chosen = write_checkpoint(tmp_path / "one", 2)
    write_checkpoint(tmp_path / "two", 4)
    with pytest.raises(UsageError, match="is not empty"):
        inspect(tmp_path / "two", resume=str(chosen))
    assert inspect(tmp_path / "three", resume=str(chosen)).resume == chosen


def test_file_named_like_a_checkpoint(tmp_path):
    (tmp_path / "checkpoint-99").write_text("")
    assert list_checkpoints(tmp_path) == []


def test_checkpoint_of_an_earlier_version_is_rejected(tmp_path):
    checkpoint = write_checkpoint(tmp_path, 2)
    (checkpoint / "optimizer.pt").write_bytes(b"pickled")
    for resume in (None, "auto", str(checkpoint)):
        with pytest.raises(UsageError, match="by an earlier version of this program"):
            inspect(tmp_path, resume=resume)
