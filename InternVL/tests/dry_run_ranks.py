"""Dry run on two ranks: `python dry_run_ranks.py FOLDER`, with RANK and WORLD_SIZE set.

Each rank writes its results to FOLDER/RANK.json.
"""

import contextlib
import json
import os
import sys
from pathlib import Path
from unittest.mock import MagicMock

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from internvl_chat.model.memory import PackSize
from internvl_chat.train.preflight.dry_run import run_dry_run
from internvl_chat.train.preflight.memory import MemoryPlan
from internvl_chat.utils import distributed
from internvl_chat.utils.errors import TrainingError

OUT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines.")
COMPONENTS = {
    "weights": 100,
    "gradients": 60,
    "optimizer state": 50,
    "optimizer scratch": 0,
    "communication buffers": 0,
    "activations": 700,
    "logits": 30,
    "vision": 10,
}


def a_plan(layers: int = 8, checkpointed: int = 0, **values) -> MemoryPlan:
    plan = {
        "parallel": "single",
        "checkpointed_layers": checkpointed,
        "components": COMPONENTS,
        "available": 1000,
        "pack": PackSize(1234, 56, 7),
        "sample_indices": [],
        "several_packs": False,
        "layers": layers,
        "fitting_flags": lambda limit: {f"--below {limit}": limit},
    }
    return MemoryPlan(**(plan | values))


class Device:
    """Simulated device on which the pack fits if enough layers are checkpointed."""

    def __init__(self, enough: int, start: int = 0, error: Exception = OUT) -> None:
        self.enough, self.checkpointed, self.error = enough, start, error
        self.tried: list[int] = []

    def forward_backward(self) -> None:
        self.tried.append(self.checkpointed)
        if self.checkpointed < self.enough:
            raise self.error

    def set_checkpointing(self, count: int) -> None:
        self.checkpointed = count

    def run(
        self,
        *,
        layers: int = 8,
        device: str = "cpu",
        sharded: bool = False,
        grad_checkpoint: str = "auto",
        loaded: bool = False,
        **plan,
    ) -> int:
        loop = MagicMock()  # its forward pass and optimizer step do nothing
        loop.run.device = torch.device(device)
        loop.forward_backward = lambda *_, **__: self.forward_backward()
        loop.strategy.shards_weights = sharded
        loop.strategy.optimizer.state = {"loaded": True} if loaded else {}
        loop.strategy.model.checkpoint_layers = self.set_checkpointing
        return run_dry_run(loop, a_plan(layers, self.checkpointed, **plan), grad_checkpoint)


class ShardedDevice(Device):
    """Simulated device whose passes are collectives, as with FSDP2; rank 1 fails in the second pass."""

    def __init__(self) -> None:
        super().__init__(enough=0)
        self.model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)])
        for module in [*self.model, self.model]:
            fully_shard(module)

    def forward_backward(self) -> None:
        super().forward_backward()
        out = self.model[2](self.model[1](self.model[0](torch.ones(2, 8, requires_grad=True))))
        if distributed.rank() == 1:
            out.register_hook(self.fail)
        out.sum().backward()

    def fail(self, gradient: torch.Tensor) -> None:
        raise self.error


def storages(*, reduced: bool) -> int:
    """Return the number of distinct storages of the six DDP gradients."""
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(6)])
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    with contextlib.nullcontext() if reduced else wrapped.no_sync():
        wrapped(torch.ones(2, 64)).sum().backward()
    return len({p.grad.untyped_storage().data_ptr() for p in model.parameters()})


def main(folder: Path) -> None:
    """Run all cases; in the last one, rank 0 waits forever."""
    rank = distributed.rank()
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=distributed.world_size()
    )
    device, found = Device(enough=4 * rank), {}
    found["replicated"] = [device.run(), device.tried]
    found["storages"] = {name: storages(reduced=name == "reduced") for name in ("reduced", "unreduced")}
    sharded = ShardedDevice()
    try:
        found["sharded"] = sharded.run(sharded=True)
    except (TrainingError, RuntimeError) as error:
        found["sharded"] = [type(error).__name__, str(error), sharded.tried]
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # After a failed collective, gloo's threads may abort a regular exit.
    os._exit(0)
