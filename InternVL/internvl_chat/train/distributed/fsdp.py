"""FSDP2: shard weights, gradients and optimizer state across all ranks, layer by layer."""

import contextlib
from collections.abc import Iterator

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from internvl_chat.model.modeling_internvl_chat import InternVLChatModel
from internvl_chat.train.distributed.strategy import MakeOptimizer, MakeScheduler, Strategy
from internvl_chat.utils import distributed


class FSDPStrategy(Strategy):
    """Shards a model in place: each layer of both towers is a unit, and the rest of the model is another."""

    name, shards_weights = "fsdp", True

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
        self.model = self.wrapped = model
        self.optimizer = make_optimizer(model)
        self.scheduler = make_scheduler(self.optimizer)

    @contextlib.contextmanager
    def gradient_sync(self, last: bool) -> Iterator[None]:
        """See `Strategy`."""
        self.wrapped.set_requires_gradient_sync(last)
        yield
