"""Saving while training goes on: what is copied, who waits for whom, and what happens to errors."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerState

from internvl_chat.model.checkpoint import load_model, save_model
from internvl_chat.model.weights import open_weights
from internvl_chat.train.checkpoint import background as background_save
from internvl_chat.train.checkpoint import quiet_file
from internvl_chat.train.checkpoint.background import BackgroundSaver
from internvl_chat.train.checkpoint.folder import CheckpointFiles, CheckpointFolder
from internvl_chat.train.checkpoint.run_folder import list_checkpoints
from internvl_chat.train.checkpoint.snapshot import bytes_to_copy, copy_to_host

CPU = torch.device("cpu")
PATIENCE = 20  # seconds after which a thread that should have gone on is stuck


class Disk:
    """Stands for a slow disk: a write goes on only when it may."""

    def __init__(self):
        self.started, self.may_go_on = threading.Event(), threading.Event()
        self.written = []

    def write(self, tensors):
        self.started.set()
        assert self.may_go_on.wait(PATIENCE)
        self.written.append(tensors)


@pytest.fixture
def saver():
    with BackgroundSaver(CPU) as saver:
        yield saver


@pytest.fixture
def disk():
    disk = Disk()
    yield disk
    disk.may_go_on.set()


class TestSnapshot:
    def test_structure_and_numbers_stay(self):
        weight = torch.arange(6.0).reshape(2, 3).T
        groups = [{"lr": 0.1, "betas": (0.9, 1)}]
        copy = copy_to_host({"state": {0: {"step": torch.tensor(3.0), "m": weight}}, "groups": groups})
        assert torch.equal(copy["state"][0].pop("m"), weight)
        assert copy["state"][0].pop("step") == 3
        assert copy == {"state": {0: {}}, "groups": groups}

    def test_later_changes_do_not_show(self):
        weight = torch.nn.Parameter(torch.ones(3))
        tree = {"weight": weight, "list": [weight.detach()]}
        copy = copy_to_host(tree)
        with torch.no_grad():
            weight.zero_()
        tree["list"].clear()
        assert copy["weight"].tolist() == [1, 1, 1]
        assert copy["list"][0] is copy["weight"]
        assert not copy["weight"].requires_grad

    def test_what_shares_memory_shares_it_in_the_copy(self):
        words = torch.rand(4, 2)
        copy = copy_to_host({"words": words, "head": words.detach(), "other": words.clone(), "row": words[0]})
        assert copy["words"].data_ptr() == copy["head"].data_ptr() != words.data_ptr()
        assert copy["other"].data_ptr() != copy["words"].data_ptr()
        assert torch.equal(copy["row"], words[0])
        assert bytes_to_copy({"words": words, "head": words.detach()}) == words.nbytes

    def test_fixed_tensors_are_not_copied(self):
        frozen, trained = torch.ones(1000), torch.ones(2)
        tree = {"frozen": frozen, "trained": trained}
        copy = copy_to_host(tree, [frozen])
        assert copy["frozen"].data_ptr() == frozen.data_ptr()
        assert copy["trained"].data_ptr() != trained.data_ptr()
        assert bytes_to_copy(tree, [frozen]) == trained.nbytes

    def test_tied_weights_are_written_once(self, tiny_model, tmp_path):
        model = load_model(tiny_model, image_context_id=0)
        model.language_model.lm_head.weight = model.language_model.model.embed_tokens.weight
        save_model(model, tmp_path, copy_to_host(dict(model.state_dict())))
        assert "language_model.lm_head.weight" not in open_weights(tmp_path / "model.safetensors")


class TestSaver:
    def test_writes_what_was_there(self, saver, disk):
        weight = torch.ones(1000)
        saver.save({"weight": weight}, disk.write)
        saver.wait_until_copied()
        weight.zero_()
        disk.may_go_on.set()
        saver.wait()
        assert disk.written[0]["weight"].sum() == 1000

    def test_training_goes_on_while_the_disk_is_slow(self, saver, disk):
        saver.save({"weight": torch.ones(3)}, disk.write)
        saver.wait_until_copied()
        assert disk.started.wait(PATIENCE)
        assert not disk.written

    def test_step_waits_for_the_copies(self, saver, disk, monkeypatch):
        may_copy, order = threading.Event(), []

        def slow_copy(tree, fixed):
            assert may_copy.wait(PATIENCE)
            order.append("copied")
            return copy_to_host(tree, fixed)

        monkeypatch.setattr(background_save, "copy_to_host", slow_copy)
        weight = torch.ones(3)
        saver.device = torch.device("meta")  # one whose work does not compete with the copying
        saver.save({"weight": weight}, disk.write)

        def step():
            saver.wait_until_copied()
            order.append("stepped")
            weight.zero_()

        stepping = threading.Thread(target=step)
        stepping.start()
        time.sleep(0.05)
        assert order == []
        may_copy.set()
        stepping.join(PATIENCE)
        assert order == ["copied", "stepped"]
        disk.may_go_on.set()
        saver.wait()
        assert disk.written[0]["weight"].sum() == 3

    def test_second_save_waits_for_the_first(self, saver, disk):
        order = []

        def first(tensors):
            disk.write(tensors)
            order.append("first written")

        saver.save({}, first)
        threading.Timer(0.05, disk.may_go_on.set).start()
        saver.save({}, lambda _: order.append("second written"))
        saver.wait()
        assert order == ["first written", "second written"]

    @pytest.mark.parametrize("call", ["wait", "wait_until_copied", "save", "leave"])
    def test_errors_reach_the_caller_once(self, call):
        def fail(_):
            raise OSError(28, "No space left on device")

        saver = BackgroundSaver(CPU)
        calls = {
            "wait": saver.wait,
            "wait_until_copied": lambda: (saver._thread.join(), saver.wait_until_copied()),
            "save": lambda: saver.save({}, pytest.fail),
            "leave": lambda: saver.__exit__(None, None, None),
        }
        saver.save({}, fail)
        with pytest.raises(OSError, match="No space left"):
            calls[call]()
        saver.wait()

    def test_error_while_copying_does_not_block_the_step(self, saver, monkeypatch):
        def fail(*_):
            raise MemoryError

        monkeypatch.setattr(background_save, "copy_to_host", fail)
        saver.save({"weight": torch.ones(3)}, pytest.fail)
        saver._thread.join()
        with pytest.raises(MemoryError):
            saver.wait_until_copied()

    def test_leaving_ends_the_save_and_keeps_an_error_of_training(self, disk, caplog):
        threading.Timer(0.05, disk.may_go_on.set).start()
        with pytest.raises(KeyboardInterrupt), BackgroundSaver(CPU) as saver:
            saver.save({"weight": torch.ones(3)}, disk.write)
            raise KeyboardInterrupt
        assert len(disk.written) == 1

        def fail(_):
            raise OSError("disk full")

        with pytest.raises(ValueError, match="training"), BackgroundSaver(CPU) as saver:
            saver.save({}, fail)
            raise ValueError("training")
        assert "the last checkpoint was not written: disk full" in caplog.text

    def test_without_memory_for_copies_it_writes_at_once(self, saver, monkeypatch, caplog):
        weight, written = torch.ones(1000), []
        for available in (4799, 4799, 4801):
            monkeypatch.setattr(
                background_save.psutil, "virtual_memory", lambda n=available: SimpleNamespace(available=n)
            )
            saver.save({"weight": weight}, written.append)
            if available == 4799:
                assert written[-1]["weight"] is weight
        saver.wait()
        assert written[-1]["weight"] is not weight
        assert caplog.text.count("training waits while checkpoints are written") == 1

    def test_copies_are_freed(self, saver):
        sizes = []
        for fail in (False, True):
            references = []

            def write(tensors, fail=fail, references=references):
                references.append(torch.multiprocessing.reductions.StorageWeakRef(
                    tensors["weight"].untyped_storage()))  # fmt: skip
                if fail:
                    raise OSError

            saver.save({"weight": torch.ones(3)}, write)
            saver._thread.join()
            sizes.append(references[0].expired())
        with pytest.raises(OSError):
            saver.wait()
        assert sizes == [True, True]


def save_weights(folder, weights):
    torch.save(weights, folder / "weights.pt")


def files(output, step, save_model_to=save_weights, keep=1, scheduler=None):
    folder = CheckpointFolder(output, step, {"seed": 1}, keep=keep, best=None)
    state = TrainerState(global_step=step, log_history=[{"loss": 1.5}])
    return CheckpointFiles(folder, save_model_to, scheduler, state, pause=lambda seconds: None)


TENSORS = {"weights": {"w": torch.ones(2)}, "optimizer": {"state": {}}}


class TestQuietFile:
    def test_holds_what_was_written(self, tmp_path, monkeypatch):
        monkeypatch.setattr(quiet_file, "_PIECE", 1000)
        state = {n: torch.rand(n) for n in (0, 1, 7, 999, 5000)}
        spent = []
        with quiet_file.QuietFile(tmp_path / "state.pt", spent.append) as file:
            torch.save(state, file)
        for key, tensor in torch.load(tmp_path / "state.pt", weights_only=True).items():
            assert torch.equal(tensor, state[key])
        assert len(spent) == (tmp_path / "state.pt").stat().st_size // 1000
        assert min(spent) > 0

    def test_thread_rests_until_somebody_waits(self, saver):
        rested = threading.Event()

        def write(_):
            saver.pause(PATIENCE)
            rested.set()

        saver.save({}, write)
        assert not rested.wait(0.05)
        began = time.perf_counter()
        saver.wait()
        assert rested.is_set()
        assert time.perf_counter() - began < PATIENCE

    def test_nobody_rests_who_waits_or_has_a_gpu(self, saver):
        for device, in_background in (("cpu", False), ("meta", True)):
            saver.device, saver.in_background = torch.device(device), in_background
            began = time.perf_counter()
            saver.save({}, lambda _: saver.pause(PATIENCE))
            saver._thread and saver._thread.join()
            assert time.perf_counter() - began < PATIENCE


class TestFolder:
    def test_holds_what_a_run_resumes_from(self, tmp_path):
        files(tmp_path, 3, scheduler={"last_epoch": 3}).write(TENSORS)
        folder = tmp_path / "checkpoint-3"
        assert {p.name for p in folder.iterdir()} == {
            "weights.pt", "optimizer.pt", "scheduler.pt", "trainer_state.json", "run_fingerprint.json",
            "manifest.json",
        }  # fmt: skip
        state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        assert (state.global_step, state.log_history) == (3, [{"loss": 1.5}])
        assert torch.load(folder / "scheduler.pt", weights_only=True) == {"last_epoch": 3}
        assert not any((tmp_path / ".partial").iterdir())

    def test_older_ones_go_when_the_new_one_is_whole(self, tmp_path):
        there = []

        def watch(folder, weights):
            there.append([p.name for p in list_checkpoints(tmp_path)])
            save_weights(folder, weights)

        for step in (9, 10, 11):
            files(tmp_path, step, watch).write(TENSORS)
        assert there == [[], ["checkpoint-9"], ["checkpoint-10"]]
        assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-11"]

    def test_a_failed_one_leaves_the_last_good(self, tmp_path, caplog):
        def fail(folder, weights):
            save_weights(folder, weights)
            raise OSError(28, "No space left on device")

        files(tmp_path, 1).write(TENSORS)
        files(tmp_path, 2, fail).write(TENSORS)
        assert (
            f"{tmp_path / 'checkpoint-2'} was not written: [Errno 28] No space left on device" in caplog.text
        )
        assert "checkpoint-1 stays the newest, and training goes on" in caplog.text
        assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
        assert not any((tmp_path / ".partial").iterdir())
