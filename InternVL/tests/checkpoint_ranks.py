"""Helpers of the checkpoint tests: a small model in every parallel layout, saved and loaded by ranks."""

import io
import logging
import os
import signal

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from internvl_chat.model.io.weights import write_file
from internvl_chat.train.checkpoint import saver
from internvl_chat.train.checkpoint.saver import Checkpointer, load_training_state
from internvl_chat.train.checkpoint.staging import HostBuffers
from internvl_chat.train.checkpoint.state import TrainState
from internvl_chat.train.checkpoint.weights import WeightGatherer
from internvl_chat.train.distributed.deepspeed import DeepSpeedStrategy
from internvl_chat.train.distributed.fsdp import create_mesh
from internvl_chat.train.distributed.strategy import full_tensor, local_shard
from internvl_chat.train.optim.adamw import build_adamw
from internvl_chat.utils import distributed
from internvl_chat.utils.hashed_file import HashedFile

CPU = torch.device("cpu")


class Toy(nn.Module):
    """Model with empty shards on some ranks, a tied head, a frozen layer and a buffer."""

    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.words = nn.Embedding(7, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 5), nn.Linear(5, 1)])
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.words.weight
        self.register_buffer("scale", torch.ones(2))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.to(dtype)

    def forward(self, ids):
        return self.head(self.words(ids)) + self.layers[1](self.layers[0](self.words(ids)))


def master_adamw(groups):
    return build_adamw(groups, precision="master", lr=0.1, weight_decay=0.0)


class ToyStrategy:
    """A toy model on one rank, replicated, sharded by FSDP2, or sharded in two replicas by HSDP."""

    def __init__(self, layout, make_optimizer=master_adamw, dtype=torch.bfloat16):
        self.name, self.model = layout, Toy(dtype)
        self.shards_weights = layout in ("fsdp", "hsdp")
        if self.shards_weights:
            size = distributed.world_size()
            mesh = create_mesh("cpu", size if layout == "fsdp" else size // 2)
            for layer in self.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        groups = [{"params": trained[:1], "weight_decay": 0.1}, {"params": trained[1:]}]
        self.optimizer = make_optimizer(groups)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))

    def train(self, steps, first=0):
        """Run steps whose gradients depend only on the step."""
        for step in range(first, first + steps):
            generator = torch.Generator().manual_seed(step)
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                    if isinstance(parameter, DTensor):
                        grad = distribute_tensor(grad, parameter.device_mesh, parameter.placements)
                    parameter.grad = grad
            self.optimizer.step()
            self.scheduler.step()

    def full_state(self):
        """Return the full state that a resumed run must restore."""
        names = {p: name for name, p in self.model.named_parameters()}
        state = {
            f"{names[p]}/{key}": full_tensor(value).clone() if isinstance(value, torch.Tensor) else value
            for p, values in self.optimizer.state.items()
            for key, value in values.items()
        }
        options = [
            {k: v for k, v in g.items() if k not in ("params", "differentiable")}
            for g in self.optimizer.param_groups
        ]
        return state, options, self.scheduler.state_dict()


def write_toy(folder, weights):
    """Write the weights to one file, tied weights only once; return its size and hash."""
    folder.mkdir(parents=True, exist_ok=True)
    unique = {tensor.data_ptr(): (name, tensor) for name, tensor in reversed(weights.items())}
    return {"model.safetensors": write_file(dict(unique.values()), folder / "model.safetensors")}


def checkpointer(output, strategy, write_model=write_toy, **options):
    """Return a checkpointer with test defaults."""
    options = {"keep": None, "model_only": False, "background": True, "device": CPU} | options
    return Checkpointer(output, strategy, write_model, fingerprint={"seed": 1}, **options)


def assert_same_state(one, other):
    """Assert that two results of `full_state` are bit-identical."""
    assert one[0].keys() == other[0].keys()
    for key, value in one[0].items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == other[0][key].dtype, key
            assert torch.equal(value, other[0][key]), key
        else:
            assert value == other[0][key], key
    assert one[1:] == other[1:]


# Functions that are called on every rank


def move(layout, source, target, reference):
    """Load a checkpoint, compare and save it; return the numbers of elements read and owned."""
    strategy, read = ToyStrategy(layout), []
    read_data = dcp.HuggingFaceStorageReader.read_data

    def record(self, plan, planner):
        read.extend(item.lengths.numel() for item in plan.items)
        return read_data(self, plan, planner)

    dcp.HuggingFaceStorageReader.read_data = record
    try:
        state = load_training_state(source, strategy)
    finally:
        dcp.HuggingFaceStorageReader.read_data = read_data
    assert_same_state(strategy.full_state(), torch.load(reference))
    tensors = [v for values in strategy.optimizer.state.values() for v in values.values()]
    owned = sum(local_shard(tensor).numel() for tensor in tensors)
    if target is not None:
        with checkpointer(target, strategy) as writer:
            writer.save(state)
            writer.before_optimizer_step()
            strategy.train(1, first=9)
    return sum(read), owned


def save_with_failures(layout, output):
    """Save six checkpoints, four of which fail on one rank; return the log of this rank."""
    strategy, rank = ToyStrategy(layout), distributed.rank()
    log = io.StringIO()
    logging.getLogger("internvl_chat").addHandler(logging.StreamHandler(log))

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    failures = {
        2: (HashedFile, "write", 1),
        3: (HostBuffers, "copy", 1),
        4: (saver, "write_manifest", 0),
        5: (HostBuffers, "synchronize", 1),
    }
    with checkpointer(output, strategy) as writer:
        for step in range(1, 7):
            strategy.train(1, first=step)
            owner, name, failing = failures.get(step, (None, "", None))
            working = getattr(owner, name, None)
            if rank == failing:
                setattr(owner, name, fail)
            writer.save(TrainState(step=step))
            writer.before_optimizer_step()
            writer.wait()
            assert (writer.failure is None) == (step in (1, 6))
            if rank == failing:
                setattr(owner, name, working)
            distributed.barrier()
            assert not list(output.glob(".partial/*"))
    return log.getvalue()


def gather_without_a_shard():
    """Gather sharded weights without a shard of rank 1, then with it; return the error of the first try."""
    gatherer = WeightGatherer(ToyStrategy("fsdp").model, distributed.new_host_group())
    copies = gatherer.prepare()
    incomplete = {name: t for name, t in copies.items() if name != "layers.0.weight"}
    with pytest.raises(distributed.AgreedError) as caught:
        gatherer.gather(copies if distributed.rank() == 0 else incomplete)
    full = gatherer.gather(copies)
    assert distributed.rank() or torch.equal(full["layers.0.weight"], Toy().layers[0].weight)
    return str(caught.value)


class DeepSpeedToy(ToyStrategy):
    """A toy model in a DeepSpeed engine."""

    def __init__(self, stage):
        import deepspeed

        super().__init__("deepspeed", dtype=torch.float32)
        self.stage = stage
        config = {
            "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True, "steps_per_print": 10**9,
        }  # fmt: skip
        optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=0.1)
        self.engine, self.optimizer, *_ = deepspeed.initialize(
            model=self.model, optimizer=optimizer, config=config
        )

    def step(self):
        """Run a step on rows that depend only on the step; return the loss."""
        words = torch.tensor([[self.engine.global_steps % 7]])
        loss = self.engine(words).square().sum()
        self.engine.backward(loss)
        self.engine.step()
        return loss.item()

    def full_weights(self):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.model.parameters()), enabled=self.stage == 3):
            return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}


def save_deepspeed_with_failures(stage, output):
    """Save four checkpoints, two of which fail on a rank, and resume; return the log of this rank."""
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    strategy, rank, save = DeepSpeedToy(stage), distributed.rank(), TorchCheckpointEngine.save
    log = io.StringIO()
    logging.getLogger("internvl_chat").addHandler(logging.StreamHandler(log))

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    def write_model(folder, weights):
        return fail() if folder.name == "checkpoint-3" else write_toy(folder, weights)

    with checkpointer(output, strategy, write_model) as writer:
        for step in range(1, 5):
            strategy.step()
            TorchCheckpointEngine.save = fail if (step, rank) == (2, 1) else save
            writer.save(TrainState(step=step))
            assert not writer.busy
    expected = [strategy.step() for _ in range(3)]
    resumed = DeepSpeedToy(stage)
    assert load_training_state(output / "checkpoint-4", resumed) == TrainState(step=4)
    assert [resumed.step() for _ in range(3)] == expected
    return log.getvalue()


def gather_zero3_with_a_failure():
    """Gather ZeRO-3's weights while rank 0 has no memory, then again; return whether each try has failed."""
    config = {
        "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True, "steps_per_print": 10**9,
    }  # fmt: skip
    strategy = DeepSpeedStrategy(
        Toy(torch.float32),
        lambda model: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]),
        torch.optim.lr_scheduler.ConstantLR,
        config,
    )
    to, failed = torch.Tensor.to, []

    def fail(self, *args, **options):
        if options.get("copy") and distributed.rank() == 0:
            raise RuntimeError("out of memory")
        return to(self, *args, **options)

    for replacement in (fail, to):
        torch.Tensor.to = replacement
        try:
            weights = strategy.full_weights()
            failed.append(False)
        except RuntimeError:
            failed.append(True)
        finally:
            torch.Tensor.to = to
    expected = {} if distributed.rank() else Toy(torch.float32).state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], weight) for name, weight in expected.items())
    return failed


def save_and_be_killed(output):
    """Save a checkpoint, and exit while writing the next one."""
    strategy = ToyStrategy("single")
    strategy.train(1)
    with checkpointer(output, strategy) as writer:
        writer.save(TrainState(step=1))
    write_manifest = saver.write_manifest

    def die(*arguments, **options):
        write_manifest(*arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    saver.write_manifest = die
    checkpointer(output, strategy, background=False).save(TrainState(step=2))
