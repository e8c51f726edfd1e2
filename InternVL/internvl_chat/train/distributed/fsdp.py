"""FSDP2: shard weights, gradients and optimizer state across all ranks, layer by layer."""

import contextlib
from collections.abc import Iterator
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from internvl_chat.train.distributed.strategy import Strategy
from internvl_chat.utils import distributed


class FSDPStrategy(Strategy):
    """Shards a model in place: one unit per transformer layer, and one for the rest of the model."""

    name, shards_weights = "fsdp", True

    def _wrap(self, device: torch.device, bucket_cap_mb: int | None) -> nn.Module:
        mesh = init_device_mesh(device.type, (distributed.world_size(),))
        for layer in self.model.blocks:
            fully_shard(layer, mesh=mesh)
        self.model.always_run_vision = True
        fully_shard(self.model, mesh=mesh)
        return self.model

    @contextlib.contextmanager
    def gradient_sync(self, last: bool) -> Iterator[None]:
        """See `Strategy`."""
        cast(FSDPModule, self.model).set_requires_gradient_sync(last)
        yield
