"""Checkpoint saving: files, background synchronization, and failures."""

import json
import os
import sys
import threading

import pytest
import torch
from checkpoint_ranks import (
    CPU,
    ToyStrategy,
    checkpointer,
    gather_without_a_shard,
    gather_zero3_with_a_failure,
    save_and_be_killed,
    save_deepspeed_with_failures,
    save_with_failures,
    write_toy,
)
from helpers import HANG_SECONDS
from ranks import run_ranks
from safetensors.torch import load_file

from internvl_chat.model.io.checkpoint import load_model
from internvl_chat.model.lora.injection import add_lora
from internvl_chat.train.checkpoint import staging
from internvl_chat.train.checkpoint.best import copy_best
from internvl_chat.train.checkpoint.manifest import find_damage
from internvl_chat.train.checkpoint.run_folder import inspect_output_folder, list_checkpoints
from internvl_chat.train.checkpoint.saver import load_training_state
from internvl_chat.train.checkpoint.staging import HostBuffers
from internvl_chat.train.checkpoint.state import TrainState
from internvl_chat.train.freeze import set_trainable

# Timeout for a blocked thread.
PATIENCE = HANG_SECONDS


def names(output):
    return [path.name for path in list_checkpoints(output)]


@pytest.fixture
def strategy():
    strategy = ToyStrategy("single")
    strategy.train(1)
    return strategy


class Disk:
    """Simulated slow disk: writes wait until `may_go_on` is set."""

    def __init__(self, write_model=write_toy):
        self.started, self.may_go_on, self.write_model = threading.Event(), threading.Event(), write_model

    def __call__(self, folder, weights):
        self.started.set()
        assert self.may_go_on.wait(PATIENCE)
        return self.write_model(folder, weights)


@pytest.fixture
def disk():
    disk = Disk()
    yield disk
    disk.may_go_on.set()


class TestCheckpoint:
    def test_contains_everything_needed_to_resume(self, tmp_path, strategy):
        state = TrainState(
            3, 0.5, best_step=2, best_metric=0.25, evals_without_improvement=1, total_flops=9.0
        )
        with checkpointer(tmp_path, strategy) as saver:
            saver.save(state)
        folder = tmp_path / "checkpoint-3"
        assert {path.name for path in folder.iterdir()} == {
            "model.safetensors", "optimizer", "trainer_state.json", "run_fingerprint.json", "manifest.json",
        }  # fmt: skip
        values = json.loads((folder / "trainer_state.json").read_text())
        found = [values[key] for key in ("global_step", "epoch", "best_global_step", "best_metric")]
        assert found == [3, 0.5, 2, 0.25]
        assert load_training_state(folder, ToyStrategy("single")) == state
        assert not (tmp_path / ".partial").exists()

    def test_tied_weights_are_saved_once_and_frozen_weights_are_not_copied(self, tmp_path, strategy):
        given = {}

        def write(folder, weights):
            given.update({name: tensor.data_ptr() for name, tensor in weights.items()})
            return write_toy(folder, weights)

        with checkpointer(tmp_path, strategy, write) as saver:
            saver.save(TrainState(step=1))
        live = {name: tensor.data_ptr() for name, tensor in strategy.model.state_dict().items()}
        assert given.keys() == live.keys()
        assert given["words.weight"] == given["head.weight"] != live["words.weight"]
        for name in live:
            is_fixed = name.startswith(("frozen", "scale"))
            assert (given[name] == live[name]) == is_fixed, name
        assert "head.weight" not in load_file(tmp_path / "checkpoint-1/model.safetensors")

    def test_only_adapters_are_written(self, tmp_path, tiny_model):
        model, given = load_model(tiny_model, image_context_id=0), []
        add_lora(model, llm_rank=2, vision_rank=0, dropout=0.0)
        set_trainable(model, freeze_llm=True, freeze_mlp=False, freeze_backbone=True)
        strategy = ToyStrategy("single")
        strategy.model = model
        strategy.optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
        with checkpointer(tmp_path, strategy, lambda _, weights: given.extend(weights) or {}) as saver:
            saver.save(TrainState(step=1))
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert given == [name for name in model.state_dict() if name in trained]
        assert any(".lora_" in name for name in given) and any(name.startswith("mlp1.") for name in given)

    def test_older_checkpoints_are_deleted_after_a_complete_save(self, tmp_path, strategy):
        found = []

        def watch(folder, weights):
            found.append(names(tmp_path))
            return write_toy(folder, weights)

        (tmp_path / "checkpoint-1-mine").mkdir()
        with checkpointer(tmp_path, strategy, watch, keep=2) as saver:
            for step in (8, 9, 10, 11):
                saver.save(TrainState(step=step, best_step=8))
        assert found[2:] == [["checkpoint-8", "checkpoint-9"], ["checkpoint-8", "checkpoint-10"]]
        assert names(tmp_path) == ["checkpoint-8", "checkpoint-11"]
        assert (tmp_path / "checkpoint-1-mine").is_dir()

    def test_the_finished_model_is_written_in_the_foreground(self, tmp_path, strategy):
        def fail(folder, weights):
            raise OSError(28, "No space left on device")

        saver = checkpointer(tmp_path, strategy)
        saver.save_model(tmp_path / "model")
        written = load_file(tmp_path / "model/model.safetensors")
        assert torch.equal(written["words.weight"], strategy.model.words.weight)
        with pytest.raises(OSError, match="No space left"):
            checkpointer(tmp_path, strategy, fail).save_model(tmp_path)


class TestBackground:
    def test_background_save_is_not_affected_by_training(self, tmp_path, strategy, disk):
        weight, state = strategy.model.words.weight.detach().clone(), TrainState(step=1)
        with checkpointer(tmp_path, strategy, disk) as saver:
            saver.save(state)
            saver.before_optimizer_step()
            state.step = 2
            strategy.train(3, first=1)
            assert saver.busy
            assert names(tmp_path) == []
            disk.may_go_on.set()
        assert not saver.busy
        found = ToyStrategy("single")
        assert load_training_state(tmp_path / "checkpoint-1", found) == TrainState(step=1)
        assert found.full_state()[0]["words.weight/step"] == 1
        assert torch.equal(load_file(tmp_path / "checkpoint-1/model.safetensors")["words.weight"], weight)

    def test_second_save_waits_for_the_first(self, tmp_path, strategy, disk):
        with checkpointer(tmp_path, strategy, disk) as saver:
            saver.save(TrainState(step=1))
            assert disk.started.wait(PATIENCE)
            threading.Timer(0.05, disk.may_go_on.set).start()
            saver.save(TrainState(step=2))
            assert names(tmp_path)[0] == "checkpoint-1"

    def test_foreground_save_makes_no_copies(self, tmp_path, strategy, monkeypatch):
        monkeypatch.setattr(HostBuffers, "copy", lambda *_: pytest.fail("copied"))
        saver = checkpointer(tmp_path, strategy, background=False)
        saver.save(TrainState(step=1))
        assert names(tmp_path) == ["checkpoint-1"]

    def test_buffers_are_reused(self, tmp_path, strategy):
        pointers = []

        def write(folder, weights):
            pointers.append({name: tensor.data_ptr() for name, tensor in weights.items()})
            return write_toy(folder, weights)

        with checkpointer(tmp_path, strategy, write) as saver:
            for step in (1, 2, 3):
                saver.save(TrainState(step=step))
        assert pointers[0] == pointers[1] == pointers[2]

    def test_saves_in_the_foreground_without_memory_for_copies(self, tmp_path, strategy, monkeypatch, caplog):
        live, pointers = strategy.model.words.weight.data_ptr(), []
        needed = sum(t.nbytes for t in strategy.model.parameters() if t.requires_grad)
        needed += sum(v.nbytes for values in strategy.optimizer.state.values() for v in values.values())

        def write(folder, weights):
            pointers.append(weights["words.weight"].data_ptr())
            return write_toy(folder, weights)

        with checkpointer(tmp_path, strategy, write) as saver:
            for step, factor in enumerate((1.19, 1.19, 1.21, 0.0)):
                monkeypatch.setattr(staging, "available_host_memory", lambda free=factor * needed: free)
                saver.save(TrainState(step=step))
                saver.wait()
        assert [pointer == live for pointer in pointers] == [True, True, False, False]
        assert caplog.text.count("training pauses while checkpoints are written") == 1

    @pytest.mark.skipif(sys.platform != "linux", reason="other systems have no per-thread niceness")
    def test_thread_on_a_cpu_has_a_lower_priority(self, tmp_path, strategy):
        def niceness() -> int:
            return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

        def write(folder, weights):
            found.append(niceness())
            return write_toy(folder, weights)

        found, own = [], niceness()
        with checkpointer(tmp_path, strategy, write) as saver:
            saver.save(TrainState(step=1))
        with checkpointer(tmp_path, strategy, write, background=False) as saver:
            saver.save(TrainState(step=2))
        assert found == [min(own + 5, 19), own] and niceness() == own

    def test_exit_waits_for_the_save_and_propagates_errors(self, tmp_path, strategy, disk):
        threading.Timer(0.05, disk.may_go_on.set).start()
        with pytest.raises(KeyboardInterrupt), checkpointer(tmp_path, strategy, disk) as saver:
            saver.save(TrainState(step=1))
            raise KeyboardInterrupt
        assert names(tmp_path) == ["checkpoint-1"]


class TestBuffers:
    def test_copies_of_all_kinds_of_tensors(self):
        tensors = {
            "transposed": torch.arange(6.0).reshape(2, 3).T, "scalar": torch.tensor(3.0),
            "empty": torch.empty(0, 3), "bf16": torch.arange(5, dtype=torch.bfloat16),
            "int8": torch.arange(3, dtype=torch.int8),
        }  # fmt: skip
        buffers = HostBuffers(CPU)
        copies = buffers.copy(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(copies[name], tensor) and copies[name].dtype == tensor.dtype
        copies = buffers.copy({"scalar": torch.ones(3), "bf16": tensors["bf16"] + 1})
        assert copies["scalar"].tolist() == [1, 1, 1]
        assert copies["bf16"].tolist() == [1, 2, 3, 4, 5]

    def test_buffers_share_blocks(self, monkeypatch):
        monkeypatch.setattr(staging, "_BLOCK_BYTES", 200)
        tensors = {str(n): torch.full((10,), float(n)) for n in range(9)} | {"large": torch.ones(100)}
        copies = HostBuffers(CPU).copy(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(copies[name], tensor)
        assert len({copy.untyped_storage().data_ptr() for copy in copies.values()}) == 4


def test_thread_uses_the_gpu_of_the_rank(tmp_path, strategy, monkeypatch):
    calls = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda d: calls.append((d, threading.current_thread().name))
    )
    with checkpointer(tmp_path, strategy) as saver:
        saver._device = torch.device("cuda", 3)
        saver.save(TrainState(step=1))
    assert calls == [(torch.device("cuda", 3), "checkpoint")]
    assert names(tmp_path) == ["checkpoint-1"]


class TestFailures:
    @pytest.mark.parametrize("background", [True, False])
    def test_full_disk_keeps_the_last_checkpoint(self, tmp_path, strategy, caplog, background):
        def write(folder, weights):
            entries = write_toy(folder, weights)
            if folder.name == "checkpoint-2":
                raise OSError(28, "No space left on device")
            return entries

        with checkpointer(tmp_path, strategy, write, background=background) as saver:
            for step in (1, 2, 2, 3):
                saver.save(TrainState(step=step))
        reason = "[Errno 28] No space left on device"
        assert f"{tmp_path / 'checkpoint-2'} was not written: {reason}" in caplog.text
        assert "the newest checkpoint is checkpoint-1" in caplog.text
        assert names(tmp_path) == ["checkpoint-1", "checkpoint-3"]
        assert not (tmp_path / ".partial").exists()

    def test_lost_disk_does_not_end_training(self, tmp_path, strategy, monkeypatch, caplog):
        def fail(*_):
            raise OSError(116, "Stale file handle")

        with checkpointer(tmp_path, strategy, fail) as saver:
            monkeypatch.setattr("shutil.disk_usage", fail)
            saver.save(TrainState(step=1))
        assert "Stale file handle (free space: unknown)" in caplog.text

    def test_existing_checkpoint_is_never_lost(self, tmp_path, strategy):
        with checkpointer(tmp_path, strategy) as saver:
            for epoch in (1.0, 2.0):
                saver.save(TrainState(step=1, epoch=epoch))
        assert load_training_state(tmp_path / "checkpoint-1", ToyStrategy("single")).epoch == 1
        assert "Directory not empty" in saver.failure

    def test_failure_describes_the_last_save(self, tmp_path, strategy, monkeypatch):
        saver = checkpointer(tmp_path, strategy)
        saver.save(TrainState(step=1))
        saver.wait()
        assert saver.failure is None
        with monkeypatch.context() as patch:
            patch.setattr(strategy.scheduler, "state_dict", lambda: {"no": object()})
            saver.save(TrainState(step=2))
            saver.wait()
        assert f"{tmp_path / 'checkpoint-2'} was not written: Object of type" in saver.failure
        assert "the newest checkpoint is checkpoint-1" in saver.failure
        saver.save(TrainState(step=3))
        saver.wait()
        assert saver.failure is None

    def test_thread_without_permission_to_lower_its_priority(self, tmp_path, strategy, monkeypatch):
        def fail(*_):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "setpriority", fail)
        with checkpointer(tmp_path, strategy) as saver:
            saver.save(TrainState(step=1))
        assert names(tmp_path) == ["checkpoint-1"]

    def test_best_checkpoint_is_kept_until_a_better_one_is_saved(self, tmp_path, strategy, caplog):
        def write(folder, weights):
            if folder.name == "checkpoint-4":
                raise OSError(28, "No space left on device")
            return write_toy(folder, weights)

        state = TrainState()
        with checkpointer(tmp_path, strategy, write, keep=1) as saver:
            for state.step, state.best_step in ((1, None), (2, 2), (3, 2), (4, 4), (5, 4)):
                saver.save(state)
            saver.wait()
            assert names(tmp_path) == ["checkpoint-2", "checkpoint-5"]
            assert copy_best(state, tmp_path, None) == 2
            assert "the checkpoint with the best validation metric (step 4) is missing" in caplog.text
            state.step = state.best_step = 6
            saver.save(state)
        assert names(tmp_path) == ["checkpoint-6"]

    @pytest.mark.parametrize("layout", ["ddp", "fsdp"])
    def test_failure_on_one_rank(self, tmp_path, layout):
        logs = run_ranks(2, save_with_failures, layout, tmp_path)
        assert names(tmp_path) == ["checkpoint-1", "checkpoint-6"]
        assert find_damage(tmp_path / "checkpoint-6") is None
        reason = "[Errno 28] No space left on device"
        for step, rank in ((2, "rank 1: "), (3, "rank 1: "), (4, ""), (5, "rank 1: ")):
            assert f"checkpoint-{step} was not written: {rank}{reason}" in logs[0]
        assert "was not written" not in logs[1]

    def test_rank_without_its_shard(self, tmp_path):
        """The other ranks do not wait for the missing shard."""
        assert run_ranks(2, gather_without_a_shard) == ["rank 1: 'layers.0.weight'", "'layers.0.weight'"]

    def test_killed_process_keeps_the_last_checkpoint(self, tmp_path):
        with pytest.raises(AssertionError, match="have answered"):
            run_ranks(1, save_and_be_killed, tmp_path)
        assert (tmp_path / ".partial/checkpoint-2/manifest.json").exists()
        found = inspect_output_folder(tmp_path, overwrite=False, resume=None)
        assert found.resume == tmp_path / "checkpoint-1"
        found.open().release()
        assert not (tmp_path / ".partial").exists()


class TestDeepSpeed:
    @pytest.mark.parametrize("stage", [1, 3])
    def test_saves_and_resumes_without_hanging_if_a_rank_cannot_write(self, tmp_path, stage):
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
        logs = run_ranks(2, save_deepspeed_with_failures, stage, tmp_path)
        assert names(tmp_path) == ["checkpoint-1", "checkpoint-4"]
        assert find_damage(tmp_path / "checkpoint-4") is None
        state = json.loads((tmp_path / "checkpoint-4/trainer_state.json").read_text())
        assert "optimizer" not in state
        reason = "[Errno 28] No space left on device"
        for step, rank in ((2, "rank 1: "), (3, "")):
            assert f"checkpoint-{step} was not written: {rank}{reason}" in logs[0]
        assert "was not written" not in logs[1]

    def test_failure_while_zero3_gathers_weights(self):
        """The other rank does not hang on the remaining weights."""
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
        assert run_ranks(2, gather_zero3_with_a_failure) == [[True, False], [False, False]]
