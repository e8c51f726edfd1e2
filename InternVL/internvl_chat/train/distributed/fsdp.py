"""FSDP2: weights, gradients and optimizer state sharded over all ranks, layer by layer, by `fully_shard`."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from internvl_chat.model.modeling_internvl_chat import InternVLChatModel
from internvl_chat.train.distributed.strategy import (
    MakeOptimizer,
    MakeScheduler,
    ReplicatedStrategy,
    full_tensor,
)
from internvl_chat.utils import distributed


class FSDPStrategy(ReplicatedStrategy):
    """Shards a model in place; the layers of both towers are gathered one by one, the rest together.

    Args:
        model: with its trained parameters chosen.
        make_optimizer: is given the sharded model.
        make_scheduler: is given the optimizer.
        device: of this process.
    """

    shards_weights = True

    def __init__(
        self,
        model: InternVLChatModel,
        make_optimizer: MakeOptimizer,
        make_scheduler: MakeScheduler,
        device: torch.device,
    ) -> None:
        model.to(device)
        mesh = init_device_mesh(device.type, (distributed.world_size(),))
        for layer in model.blocks:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model.always_run_vision = True
        self.name, self.model, self.wrapped = "fsdp", model, model
        self.optimizer = make_optimizer(model)
        self.scheduler = make_scheduler(self.optimizer)

    @contextlib.contextmanager
    def gradient_sync(self, last: bool) -> Iterator[None]:
        """See `Strategy`."""
        self.wrapped.set_requires_gradient_sync(last)
        yield

    def full_weights(self) -> dict[str, Tensor]:
        """See `Strategy`. Weights are gathered one at a time, so that no GPU holds them all."""
        weights = {}
        for name, tensor in self.model.state_dict().items():
            full = full_tensor(tensor)
            if distributed.rank() == 0:
                weights[name] = full.cpu()
        return weights
