"""Optimizer state is resharded exactly across layouts and world sizes, without pickle."""

import json
import logging
import pickle
import threading
import weakref
from collections import Counter
from functools import partial

import pytest
import torch
from checkpoint_ranks import (
    Toy,
    ToyStrategy,
    assert_same_state,
    checkpointer,
    master_adamw,
    move,
)
from helpers import needs_torchao
from ranks import run_ranks
from safetensors.torch import load_file
from transformers import Adafactor

from internvl_chat.train.checkpoint.manifest import MANIFEST, find_damage, hash_files
from internvl_chat.train.checkpoint.optimizer_state import load_optimizer, named_state, save_optimizer
from internvl_chat.train.checkpoint.saver import has_optimizer_state, load_training_state
from internvl_chat.train.checkpoint.state import TrainState
from internvl_chat.train.optim.adamw import build_adamw
from internvl_chat.utils.errors import TrainingError

STATE = TrainState(step=3, epoch=0.5, best_step=2, best_metric=1.25, total_flops=1e15)


def save(output, strategy, **options):
    with checkpointer(output, strategy, **options) as saver:
        saver.save(STATE)
    return output / f"checkpoint-{STATE.step}"


def trained(**options):
    strategy = ToyStrategy("single", **options)
    strategy.train(3)
    return strategy


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint of a single-rank run, and a file with its full state."""
    folder, strategy = tmp_path_factory.mktemp("source"), trained()
    torch.save(strategy.full_state(), folder / "reference.pt")
    return save(folder, strategy), folder / "reference.pt"


class Wide(torch.nn.Module):
    """A weight whose moments are quantized, one that is too small, and a bias."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 3))


@needs_torchao
@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit"])
def test_quantized_state_is_restored(tmp_path, name):
    from torchao.optim import AdamW4bit, AdamW8bit

    make = partial({"AdamW8bit": AdamW8bit, "AdamW4bit": AdamW4bit}[name], lr=0.1, weight_decay=0.1)

    def train(model, optimizer, steps):
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()

    torch.compiler.set_stance("force_eager")  # torchao compiles its step
    try:
        model, again = Wide(), Wide()
        optimizer = make(model.parameters())
        train(model, optimizer, range(3))
        tensors, rest = named_state(model, optimizer)
        assert tensors["layers.0.weight/exp_avg.codes"].dtype == torch.uint8
        assert tensors["layers.1.weight/exp_avg"].dtype == torch.float32
        save_optimizer(tmp_path, tensors, tensors, threads=2, group=None)
        again.load_state_dict(model.state_dict())
        loaded = make(again.parameters())
        load_optimizer(tmp_path, again, loaded, json.loads(json.dumps(rest, default=float)))
        for group, own in zip(loaded.param_groups, optimizer.param_groups, strict=True):
            group["lr"] = own["lr"]  # the training loop sets the rate from the flags
        for one, other in zip(model.parameters(), again.parameters(), strict=True):
            assert torch.equal(one, other)  # creating the state has not changed the weights
        train(model, optimizer, range(3, 5))
        train(again, loaded, range(3, 5))
        for one, other in zip(model.parameters(), again.parameters(), strict=True):
            assert torch.equal(one, other)
    finally:
        torch.compiler.set_stance("default")


def test_state_is_resharded_across_layouts_and_world_sizes(source, tmp_path):
    checkpoint, reference = source
    for world_size, layout in ((2, "fsdp"), (4, "hsdp"), (2, "ddp"), (2, "fsdp")):
        target = tmp_path / f"{world_size} {layout}"
        for read, owned in run_ranks(world_size, move, layout, checkpoint, target, reference):
            assert read == owned  # a rank reads only its shards
        checkpoint = target / checkpoint.name
        assert find_damage(checkpoint) is None
        files = sorted((checkpoint / "optimizer").iterdir())
        assert [file.name for file in files] == [
            f"rank-{rank:05d}-00.safetensors" for rank in range(world_size)
        ]
        if layout == "ddp":
            # Each rank writes part of the replicated tensors.
            tensors = [load_file(file) for file in files]
            assert set(Counter(key for file in tensors for key in file).values()) == {1}
            sizes = [sum(tensor.nbytes for tensor in file.values()) for file in tensors]
            assert max(sizes) < sum(sizes)
        weights = load_file(checkpoint / "model.safetensors")
        for name, weight in Toy().state_dict().items():
            assert torch.equal(weights[name], weight) if name in weights else name == "head.weight"
    strategy = ToyStrategy("single")
    assert load_training_state(checkpoint, strategy) == STATE
    assert_same_state(strategy.full_state(), torch.load(reference))


@pytest.mark.parametrize(
    ("make_optimizer", "dtype"),
    [
        (master_adamw, torch.float32),
        (
            lambda groups: build_adamw(groups, precision="stochastic", lr=0.1, weight_decay=0.0),
            torch.bfloat16,
        ),
        (lambda groups: build_adamw(groups, precision="bf16", lr=0.1, weight_decay=0.0), torch.bfloat16),
        (lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9), torch.float32),
        # Float32 state of bf16 weights, non-tensor state, and tensors with other shapes than the weights.
        (lambda groups: Adafactor(groups, lr=0.1, relative_step=False), torch.bfloat16),
    ],
    ids=["float32", "stochastic", "bf16", "sgd", "adafactor"],
)
def test_resumed_steps_match_an_uninterrupted_run(tmp_path, make_optimizer, dtype):
    options = {"make_optimizer": make_optimizer, "dtype": dtype}
    uninterrupted, resumed = trained(**options), ToyStrategy("single", **options)
    checkpoint = save(tmp_path, uninterrupted)
    load_training_state(checkpoint, resumed)
    assert_same_state(resumed.full_state(), uninterrupted.full_state())
    resumed.model.load_state_dict(uninterrupted.model.state_dict())
    for strategy in (uninterrupted, resumed):
        strategy.train(2, first=3)
    assert_same_state(resumed.full_state(), uninterrupted.full_state())
    for name, weight in uninterrupted.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


def test_files_are_hashed_while_they_are_written(tmp_path, monkeypatch):
    hashed = []

    def count(files, *arguments):
        hashed.extend(files := list(files))
        return hash_files(files, *arguments)

    monkeypatch.setattr("internvl_chat.train.checkpoint.manifest.hash_files", count)
    with checkpointer(tmp_path, trained()) as saver:
        saver._threads = 3
        saver.save(STATE)
    checkpoint = tmp_path / "checkpoint-3"
    files = sorted((checkpoint / "optimizer").iterdir())
    assert len(files) == 3
    assert {file.name for file in hashed} == {"run_fingerprint.json", "trainer_state.json"}
    entries = json.loads((checkpoint / MANIFEST).read_text())["files"]
    for file, digest in zip(files, hash_files(files), strict=True):
        assert entries[f"optimizer/{file.name}"] == {"bytes": file.stat().st_size, "sha256": digest}
    strategy = ToyStrategy("single")
    load_training_state(checkpoint, strategy)
    assert_same_state(strategy.full_state(), trained().full_state())


@pytest.mark.parametrize("threads", [1, 3])
def test_uncopied_tensors_are_moved_to_the_host_one_at_a_time(tmp_path, monkeypatch, threads):
    copies, most, lock = weakref.WeakSet(), [], threading.Lock()

    def copy(tensor):
        with lock:
            copies.add(found := tensor.clone())
            most.append(len(copies))
        return found

    monkeypatch.setattr(torch.Tensor, "cpu", copy)
    with checkpointer(tmp_path, trained(), background=False) as saver:
        saver._threads = threads
        saver.save(STATE)
    assert len(most) >= 20 and max(most) <= threads


class Malicious:
    """Sets `loaded` when it is unpickled."""

    loaded = False

    def __reduce__(self):
        return setattr, (Malicious, "loaded", True)


def test_pickles_are_never_loaded(tmp_path):
    checkpoint = save(tmp_path, trained())
    folder = checkpoint / "optimizer"
    for name in (".metadata", "__0_0.distcp"):
        (folder / name).write_bytes(pickle.dumps(Malicious()))
    load_training_state(checkpoint, ToyStrategy("single"))
    (folder / "rank-00000-00.safetensors").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(TrainingError, match="optimizer: cannot be read"):
        load_training_state(checkpoint, ToyStrategy("single"))
    assert not Malicious.loaded


def test_state_of_other_parameters_is_rejected(tmp_path):
    checkpoint, other = save(tmp_path, trained()), ToyStrategy("single")
    other.optimizer.param_groups[0]["params"].reverse()
    other.optimizer.param_groups[1]["params"].reverse()
    with pytest.raises(TrainingError, match="the saved parameter groups differ from those of this run"):
        load_training_state(checkpoint, other)


def test_checkpoint_without_optimizer_state(tmp_path):
    checkpoint = save(tmp_path, trained(), model_only=True)
    assert not (checkpoint / "optimizer").exists()
    assert not has_optimizer_state(checkpoint)
    strategy = ToyStrategy("single")
    load_training_state(checkpoint, strategy)
    assert not strategy.optimizer.state


def test_flags_set_the_optimizer_options(tmp_path, caplog):
    """The moments come from the checkpoint; the learning rate, betas and eps from this run."""
    checkpoint = save(tmp_path, trained())
    options = {"lr": 0.5, "betas": (0.5, 0.6), "eps": 0.1}
    other = ToyStrategy("single", partial(build_adamw, precision="master", **options))
    other.scheduler.lr_lambdas = [lambda step: step / 10] * 2
    caplog.set_level(logging.INFO)
    state = load_training_state(checkpoint, other)
    assert other.optimizer.state and other.scheduler.last_epoch == state.step
    for group in other.optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.5 * state.step / 10, (0.5, 0.6), 0.1)
    assert f"learning rate at step {state.step + 1}: {group['lr']:g} (" in caplog.text
