"""Runs that are stopped or killed, or run out of disk space, resume exactly or report the problem."""

import functools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from helpers import HANG_SECONDS, LAUNCHERS, SOURCE_ROOT, changed_weights, flags

from internvl_chat.model.io.weights import open_weights
from internvl_chat.train import internvl_chat_finetune
from internvl_chat.train.checkpoint import model_files as checkpoint_writer
from internvl_chat.train.checkpoint.run_folder import list_checkpoints
from internvl_chat.train.internvl_chat_finetune import main as train
from internvl_chat.train.loop import TrainingLoop

STEPS = 12
PATIENCE = HANG_SECONDS


def arguments(tiny_model, sample_data, folder, **values):
    common = {
        "model_name_or_path": tiny_model,
        "meta_path": sample_data / "train.json",
        "output_dir": folder,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "save_steps": 2,
    }
    return flags(**{**common, **values})


def same_run(one, other, metrics):
    """Assert that two runs have the same losses, records and weights."""
    for key in ("step", "loss", "grad_norm", "learning_rate"):
        assert [row[key] for row in metrics(one)] == [row[key] for row in metrics(other)], key
    assert (one / "ledger.jsonl").read_text() == (other / "ledger.jsonl").read_text()
    assert not changed_weights(one, other)


# Signals


class Launched:
    """A launcher process with a longer training run."""

    def __init__(self, tiny_model, sample_data, folder, world_size, **environment):
        variables = {
            "GPUS": "0", "NPROC": str(world_size), "BATCH_SIZE": "4", "MODEL_PATH": str(tiny_model),
            "META_PATH": str(sample_data / "train.json"), "OUTPUT_DIR": str(folder), "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1", "REPORT_TO": "none",
        }  # fmt: skip
        options = ["--force_image_size", "56", "--max_dynamic_patch", "6", "--max_steps", str(STEPS)]
        options += ["--save_steps", "5", "--dataloader_num_workers", "1", "--disable_tqdm", "True"]
        self.folder = folder
        self.process = subprocess.Popen(
            ["bash", str(LAUNCHERS / "M3LLM-fulldata-fullmodel.sh"), *options],
            env=os.environ | variables | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
        )  # fmt: skip

    def wait_for_step(self, step):
        """Wait for the end of a step."""
        file = self.folder / "metrics.jsonl"
        self.wait_until(lambda: file.is_file() and len(file.read_text().splitlines()) >= step)

    def wait_until(self, condition):
        began = time.monotonic()
        while not condition():
            assert self.process.poll() is None, self.process.stdout.read()
            assert time.monotonic() - began < PATIENCE
            time.sleep(0.01)

    def trainers(self):
        """The training processes."""
        children = psutil.Process(self.process.pid).children()
        return [one for one in children if "internvl_chat.train.distributed.launch" not in one.cmdline()]

    def end(self):
        """Wait for the end of the launcher; return its exit code and output."""
        output, _ = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, output


@pytest.fixture(scope="module")
def uninterrupted(tiny_model, sample_data, tmp_path_factory):
    """Return a function that returns the finished run of a world size; the disk of its log is full."""

    @functools.cache
    def get(world_size):
        folder = tmp_path_factory.mktemp("uninterrupted") / "out"
        folder.mkdir()
        (folder / "training_log.txt").symlink_to("/dev/full")
        code, output = Launched(tiny_model, sample_data, folder, world_size).end()
        assert code == 0, output
        assert f"finished: the model is in {folder}" in output
        return folder

    return get


@pytest.fixture
def launch(tiny_model, sample_data, tmp_path):
    """Return a function that starts the launcher, always with the same output folder."""
    # Tests started in the background inherit an ignored SIGINT.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)

    def start(world_size, **environment):
        return Launched(tiny_model, sample_data, tmp_path / "out", world_size, **environment)

    yield start
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def ends_uninterrupted(uninterrupted, metrics):
    """Return a function that waits for a run, compares it with an uninterrupted one, returns its output."""

    def wait(run, world_size):
        code, output = run.end()
        assert code == 0, output
        same_run(run.folder, uninterrupted(world_size), metrics)
        return output

    return wait


@pytest.mark.parametrize(
    ("name", "code", "world_size"),
    [
        ("SIGTERM", 143, 1),
        pytest.param("SIGINT", 130, 2, marks=pytest.mark.slow),
        pytest.param("SIGUSR1", 138, 2, marks=pytest.mark.slow),
    ],
)
def test_signal_saves_and_the_same_command_resumes(
    launch, ends_uninterrupted, metrics, name, code, world_size
):
    run = launch(world_size)
    run.wait_for_step(2)
    run.process.send_signal(signal.Signals[name])
    found, output = run.end()
    assert found == code, output
    assert f"stopped by {name} after step" in output
    assert "; run the same command again to resume" in output
    assert f"stopped by a signal (exit code {code}); see {run.folder}/training_log.txt" in output
    assert "Traceback" not in output
    done = len(metrics(run.folder))
    assert 2 <= done < STEPS
    assert list_checkpoints(run.folder)[-1].name == f"checkpoint-{done}"
    assert not (run.folder / "model.safetensors").exists()
    output = ends_uninterrupted(launch(world_size), world_size)
    assert f"resuming from {run.folder}/checkpoint-{done}" in output


@pytest.mark.slow
def test_a_signal_to_every_process_of_the_job(launch, ends_uninterrupted):
    """As in SLURM, dataloader workers are signaled too, and ranks twice: the launcher forwards the signal."""
    run = launch(2)
    run.wait_for_step(2)
    for process in psutil.Process(run.process.pid).children(recursive=True):
        process.send_signal(signal.SIGTERM)
    run.process.send_signal(signal.SIGTERM)
    code, output = run.end()
    assert code == 143, output
    ends_uninterrupted(launch(2), 2)


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_worker_is_restarted(launch, ends_uninterrupted, world_size):
    """torchrun restarts the rank, and the run resumes from the newest checkpoint."""
    run = launch(world_size, MAX_RESTARTS="2")
    run.wait_until((run.folder / "checkpoint-5").is_dir)  # the checkpoint is written in the background
    run.trainers()[-1].kill()
    output = ends_uninterrupted(run, world_size)
    assert re.search(rf"resuming from {run.folder}/checkpoint-(5|10)$", output, re.M)


@pytest.mark.slow
def test_run_saves_and_exits_if_its_launcher_is_killed(launch, ends_uninterrupted, metrics):
    run = launch(2)
    run.wait_for_step(2)
    trainers = run.trainers()
    assert len(trainers) == 2
    run.process.kill()
    _, alive = psutil.wait_procs(trainers, timeout=PATIENCE)
    assert not alive
    assert len(metrics(run.folder)) < STEPS
    run.process.stdout.close()
    ends_uninterrupted(launch(2), 2)


# Checkpoints


def change(file, how):
    content = bytearray(file.read_bytes())
    if how == "truncate":
        del content[len(content) // 2 :]
    elif how == "flipped":
        content[len(content) // 2] ^= 4
    elif how == "gone":
        file.unlink()
        return
    file.write_bytes(content)


@pytest.fixture(scope="module")
def finished_run(tiny_model, sample_data, tmp_path_factory):
    """A finished run with the checkpoints 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("finished_run") / "out"
    assert train(arguments(tiny_model, sample_data, folder)) == 0
    return folder


@pytest.fixture
def interrupted(finished_run, tmp_path):
    """Copy the finished run as a kill after a step leaves it, after the checkpoint of that step."""

    def copy(step):
        out = tmp_path / "out"
        shutil.copytree(finished_run, out)
        for name in ("train_results.json", "model.safetensors"):
            (out / name).unlink()
        for checkpoint in list_checkpoints(out):
            if int(checkpoint.name.removeprefix("checkpoint-")) > step:
                shutil.rmtree(checkpoint)
        for name in ("metrics.jsonl", "ledger.jsonl"):
            lines = (out / name).read_text().splitlines(keepends=True)
            (out / name).write_text("".join(lines[:step]))
        return out

    return copy


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("model.safetensors", "truncate"),
        ("optimizer/rank-00000-00.safetensors", "flipped"),
        ("trainer_state.json", "gone"),
        ("manifest.json", "truncate"),
    ],
)
def test_damaged_checkpoint_is_skipped(
    finished_run, tiny_model, sample_data, tmp_path, metrics, capfd, name, how
):
    damaged = tmp_path / "damaged"
    shutil.copytree(finished_run, damaged)
    for file in ("train_results.json", "model.safetensors"):
        (damaged / file).unlink()
    change(damaged / "checkpoint-6" / name, how)
    capfd.readouterr()
    assert train(arguments(tiny_model, sample_data, damaged, resume_from_checkpoint="auto")) == 0
    stderr = capfd.readouterr().err
    assert "checkpoint-6: " in stderr and "skipping checkpoint" in stderr and "checkpoint-4" in stderr
    same_run(finished_run, damaged, metrics)


def test_explicit_damaged_checkpoint_is_refused(interrupted, tiny_model, sample_data, tmp_path, capfd):
    out = interrupted(2)
    change(out / "checkpoint-2/optimizer/rank-00000-00.safetensors", "flipped")
    checkpoint = str(out / "checkpoint-2")
    again = arguments(tiny_model, sample_data, tmp_path / "new", resume_from_checkpoint=checkpoint)
    assert train(again) == 2
    assert (
        "cannot resume: the content of optimizer/rank-00000-00.safetensors has changed"
        in capfd.readouterr().err
    )


def test_no_new_run_if_all_checkpoints_are_damaged(interrupted, tiny_model, sample_data, capfd):
    out = interrupted(4)
    for step in (2, 4):
        change(out / f"checkpoint-{step}/model.safetensors", "truncate")
    assert train(arguments(tiny_model, sample_data, out)) == 2
    stderr = capfd.readouterr().err
    assert all(f"checkpoint-{step}: cannot resume: model.safetensors has" in stderr for step in (2, 4))
    assert "there is no checkpoint to resume from; --overwrite_output_dir True" in stderr
    assert train(arguments(tiny_model, sample_data, out, overwrite_output_dir=True)) == 0


def test_training_continues_on_a_full_disk(
    finished_run, tiny_model, sample_data, tmp_path, metrics, capfd, monkeypatch
):
    """The disk is full only while the second checkpoint is written."""
    out = tmp_path / "out"
    original, calls = checkpoint_writer.save_model, []

    def save(model, folder, state_dict=None):
        entries = original(model, folder, state_dict)
        calls.append(folder)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return entries

    monkeypatch.setattr(checkpoint_writer, "save_model", save)
    assert train(arguments(tiny_model, sample_data, out)) == 0
    stderr = capfd.readouterr().err
    assert "checkpoint-4 was not written: [Errno 28] No space left on device (" in stderr
    assert " GB); the newest checkpoint is checkpoint-2" in stderr
    assert [path.name for path in list_checkpoints(out)] == ["checkpoint-2", "checkpoint-6"]
    same_run(finished_run, out, metrics)


@pytest.mark.parametrize(("stopped", "saved"), [(True, 2), (False, 4)])
def test_failure_of_the_last_save_ends_with_an_error(
    tiny_model, sample_data, tmp_path, capfd, monkeypatch, stopped, saved
):
    """The disk is full for the checkpoint of a stopped run, or for the one of the last step."""
    out, failing = tmp_path / "out", f"checkpoint-{3 if stopped else 6}"
    save, train_step = checkpoint_writer.save_model, TrainingLoop.train_step

    def write(model, folder, state_dict=None):
        if folder.name == failing:
            raise OSError(28, "No space left on device")
        return save(model, folder, state_dict)

    def step(self, number, packs):
        if stopped and number == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(self, number, packs)

    monkeypatch.setattr(checkpoint_writer, "save_model", write)
    monkeypatch.setattr(TrainingLoop, "train_step", step)
    assert train(arguments(tiny_model, sample_data, out)) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    state = "stopped by SIGTERM after step 3" if stopped else "training finished and the model is saved"
    failure = f"{out / failing} was not written: [Errno 28] No space left on device"
    assert f"{state}, but the last checkpoint is missing: {failure}" in last
    assert f"the newest checkpoint is checkpoint-{saved}" in last
    assert ("run the same command again" in last) == stopped
    assert (out / "train_results.json").exists() == (out / "model.safetensors").exists() == (not stopped)


def test_a_file_system_without_room(tiny_model, sample_data, tmp_path, metrics, capfd):
    """The file size limit is below the model size: no checkpoint is complete, but all steps run."""
    out = tmp_path / "out"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200 * 1024, before[1]))
    try:
        code = train(arguments(tiny_model, sample_data, out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    stderr = capfd.readouterr().err
    assert code == 1, stderr
    assert stderr.count(" was not written: ") == 3
    assert "the newest checkpoint is none" in stderr
    assert [row["step"] for row in metrics(out)] == list(range(1, 7))
    assert not list_checkpoints(out) and not (out / "train_results.json").exists()
    assert "the model cannot be saved: " in stderr
    assert "Traceback" not in stderr


HANGING = """
import os, signal, sys
from internvl_chat.train.internvl_chat_finetune import main
from internvl_chat.train.loop import TrainingLoop

original = TrainingLoop.train_step

def hang(self, step, packs):
    if step == 2 and self.run.rank == 1:
        signal.alarm(300)
        signal.pause()
        os._exit(3)
    return original(self, step, packs)

TrainingLoop.train_step = hang
sys.exit(main())
"""


@pytest.mark.slow
def test_a_rank_that_hangs_in_a_step_ends_the_run(tiny_model, sample_data, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(HANGING)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [script, *arguments(tiny_model, sample_data, tmp_path / "out", ddp_timeout=20)]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE,
        env=os.environ | {"PYTHONPATH": str(SOURCE_ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert "another rank did not respond within --ddp_timeout" in result.stderr
    assert result.returncode == 1, result.stderr


def test_unwritable_log_does_not_stop_the_run(uninterrupted):
    assert (uninterrupted(1) / "training_log.txt").is_symlink()


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_missing_image_ends_a_launched_run(tiny_model, sample_data, tmp_path, world_size):
    """A dataloader worker must not delay the exit."""
    data = tmp_path / "data"
    shutil.copytree(sample_data, data)
    meta = (sample_data / "train.json").read_text().replace(str(sample_data), str(data))
    (data / "train.json").write_text(meta)
    run = Launched(tiny_model, data, tmp_path / "out", world_size)
    run.wait_for_step(1)
    shutil.rmtree(data / "images")
    code, output = run.end()
    assert code == 1, output
    assert re.search(r"jsonl, line \d+ \(record '.*'\): the image .* does not exist", output), output
    assert "Traceback" not in output


def test_concurrent_run_is_not_overwritten(interrupted, tiny_model, sample_data, capfd, monkeypatch):
    """A run stops if its output folder changes after it was checked."""
    out = interrupted(2)
    original = internvl_chat_finetune.load_records

    def meanwhile(*args, **kwargs):
        shutil.copytree(out / "checkpoint-2", out / "checkpoint-4")
        return original(*args, **kwargs)

    monkeypatch.setattr(internvl_chat_finetune, "load_records", meanwhile)
    assert train(arguments(tiny_model, sample_data, out)) == 2
    assert "another run wrote to this folder while this one was starting" in capfd.readouterr().err
    assert (out / "checkpoint-4/manifest.json").is_file()


def test_changed_annotations_are_refused(tiny_model, sample_data, tmp_path, capfd):
    data = tmp_path / "data"
    shutil.copytree(sample_data, data)
    (data / "train.json").write_text(
        (sample_data / "train.json").read_text().replace(str(sample_data), str(data))
    )
    out = tmp_path / "out"
    assert train(arguments(tiny_model, data, out, max_steps=2)) == 0
    (out / "train_results.json").unlink()
    file = next((data / "train").glob("*.jsonl"))
    file.write_text("".join(reversed(file.read_text().splitlines(keepends=True))))
    assert train(arguments(tiny_model, data, out)) == 2
    assert "SHA-256 of the annotation file of " in capfd.readouterr().err


def test_gap_in_the_ledger_is_reported(interrupted, tiny_model, sample_data, capfd):
    out = interrupted(4)
    lines = (out / "ledger.jsonl").read_text().splitlines(keepends=True)
    (out / "ledger.jsonl").write_text("".join(lines[:1] + lines[2:]))
    assert train(arguments(tiny_model, sample_data, out)) == 0
    assert "ledger.jsonl: no entry for 1 step (first: step 2)" in capfd.readouterr().err


# Steps


def spoiled(monkeypatch, steps, value=float("nan")):
    """Multiply the loss of some steps."""
    original = TrainingLoop.forward_backward

    def forward_backward(self, packs, weights, scale, **options):
        factor = value if self.state.step + 1 in steps else 1.0
        total, token_losses = original(self, packs, weights, scale * factor, **options)
        return total * factor, token_losses

    monkeypatch.setattr(TrainingLoop, "forward_backward", forward_backward)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_step_changes_no_weights(tiny_model, sample_data, tmp_path, metrics, capfd, monkeypatch, value):
    """The records of the step are listed in the log and the ledger, and the weights do not change."""
    spoiled(monkeypatch, {3, 4}, value)
    out = tmp_path / "out"
    assert train(arguments(tiny_model, sample_data, out, save_steps=1)) == 0
    stderr = capfd.readouterr().err
    assert "step 3: the loss is" in stderr and "Step skipped (1 skipped so far, 5 allowed)" in stderr
    ledger = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    assert [row["step"] for row in ledger if "skipped_because" in row] == [3, 4]
    first = ledger[2]["trained"][0]
    assert f"{first[0]} {first[1]}" in stderr
    states = [open_weights(out / f"checkpoint-{step}/model.safetensors") for step in (2, 4, 5)]
    assert all(torch.equal(read(), states[1][name]()) for name, read in states[0].items())
    assert not all(torch.equal(read(), states[2][name]()) for name, read in states[0].items())
    assert all(bool(read().isfinite().all()) for read in states[2].values())


SPOILING = """
import sys
from internvl_chat.train.internvl_chat_finetune import main
from internvl_chat.train.loop import TrainingLoop

original = TrainingLoop.forward_backward

def spoil(self, packs, weights, scale, **options):
    factor = float("nan") if self.state.step == 2 else 1.0
    total, token_losses = original(self, packs, weights, scale * factor, **options)
    return total * factor, token_losses

TrainingLoop.forward_backward = spoil
sys.exit(main())
"""


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_bad_step_changes_no_weights_with_deepspeed(tiny_model, sample_data, tmp_path, metrics, stage):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    out, script = tmp_path / "out", tmp_path / "train.py"
    script.write_text(SPOILING)
    config = SOURCE_ROOT / f"internvl_chat/shell/deepspeed/zero{stage}.json"
    values = {"save_steps": 1, "max_steps": 4, "deepspeed": config, "parallel": None}
    result = subprocess.run(
        [sys.executable, script, *arguments(tiny_model, sample_data, out, **values)],
        capture_output=True, text=True, timeout=PATIENCE,
        env=os.environ | {"PYTHONPATH": str(SOURCE_ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert [row.get("skipped_because") for row in metrics(out)] == [None, None, "the loss is nan", None]
    rates = [row["learning_rate"] for row in metrics(out)]
    assert len(set(rates)) == 4
    states = [open_weights(out / f"checkpoint-{step}/model.safetensors") for step in (2, 3, 4)]
    assert all(torch.equal(read(), states[1][name]()) for name, read in states[0].items())
    assert not all(torch.equal(read(), states[2][name]()) for name, read in states[0].items())


def test_too_many_bad_steps_end_the_run(tiny_model, sample_data, tmp_path, capfd, monkeypatch):
    spoiled(monkeypatch, {2, 4})
    assert train(arguments(tiny_model, sample_data, tmp_path / "out", max_bad_steps=1)) == 1
    stderr = capfd.readouterr().err
    assert "more than --max_bad_steps 1 allows" in stderr
    assert len((tmp_path / "out/metrics.jsonl").read_text().splitlines()) == 3
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_run_without_an_applied_step_is_not_finished(
    tiny_model, sample_data, tmp_path, metrics, capfd, monkeypatch
):
    """The run fails at first, and again when the same command resumes it after the last step."""
    spoiled(monkeypatch, {1, 2, 3})
    out = tmp_path / "out"
    command = arguments(tiny_model, sample_data, out, max_steps=3, save_steps=1)
    for _ in range(2):
        assert train(command) == 1
        stderr = capfd.readouterr().err
        assert "all 3 steps were skipped, so the model has not changed and is not saved" in stderr
        assert "finished" not in stderr
        assert not (out / "train_results.json").exists() and not list(out.glob("*.safetensors"))
    assert [row["loss"] for row in metrics(out)] == [None] * 3


def test_skipped_steps_do_not_count_in_the_results(
    tiny_model, sample_data, tmp_path, metrics, capfd, monkeypatch
):
    spoiled(monkeypatch, {1, 3}, float("inf"))
    out = tmp_path / "out"
    assert train(arguments(tiny_model, sample_data, out, max_steps=3, save_steps=1, logging_steps=3)) == 0
    stderr = capfd.readouterr().err
    [loss] = [row["loss"] for row in metrics(out) if row["loss"] is not None]
    assert f"step 3/3 (100.0%) | epoch 0.500 | loss {loss:.4f} |" in stderr
    assert f"finished: the model is in {out} (2 of 3 steps skipped)" in stderr
    assert json.loads((out / "train_results.json").read_text())["skipped_steps"] == 2
    card = (out / "README.md").read_text()
    assert "| steps | 3, 2 of them skipped |" in card
    assert f"| loss, mean of the last 1 step(s) | {loss:.4f} |" in card


# Dataloader workers


def test_killed_dataloader_worker_is_reported(tiny_model, sample_data, tmp_path, capfd, monkeypatch):
    original = TrainingLoop.train_step

    def train_step(self, step, packs):
        mine = psutil.Process().cmdline()
        for child in psutil.Process().children():
            if child.cmdline() == mine:
                child.kill()
        return original(self, step, packs)

    monkeypatch.setattr(TrainingLoop, "train_step", train_step)
    assert train(arguments(tiny_model, sample_data, tmp_path / "out", dataloader_num_workers=1)) == 1
    stderr = capfd.readouterr().err
    assert "a dataloader worker died" in stderr
    assert "Traceback" not in stderr
