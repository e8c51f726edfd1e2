"""FSDP2 and HSDP: shard weights, gradients and optimizer state layer by layer.

FSDP2 shards across all ranks. HSDP shards across the ranks of each node and replicates across nodes, so that
only gradients cross the network between nodes.
"""

import contextlib
from collections.abc import Iterator
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard

from internvl_chat.model.modeling_internvl_chat import InternVLChatModel
from internvl_chat.train.distributed.strategy import MakeOptimizer, MakeScheduler, Strategy
from internvl_chat.utils import distributed


def create_mesh(device_type: str, num_shards: int) -> DeviceMesh:
    """Return the mesh of all ranks: (num_shards,) for a single replica, otherwise (replicas, num_shards).

    The ranks of a replica are consecutive, as torchrun numbers those of a node.

    Collective: call on all ranks.
    """
    replicas = distributed.world_size() // num_shards
    if replicas == 1:
        return init_device_mesh(device_type, (num_shards,))
    return init_device_mesh(device_type, (replicas, num_shards), mesh_dim_names=("replicate", "shard"))


class FSDPStrategy(Strategy):
    """Shards a model in place: one unit per transformer layer, and one for the rest of the model.

    Args:
        model: model on any device, after `set_trainable`.
        num_shards: number of consecutive ranks across which each replica of the model is sharded.
        cpu_offload: whether to keep shards, gradients and optimizer state in host memory; with GPUs, in
            pinned memory.
    """

    shards_weights = True

    def __init__(
        self,
        model: InternVLChatModel,
        make_optimizer: MakeOptimizer,
        make_scheduler: MakeScheduler,
        device: torch.device,
        *,
        num_shards: int,
        cpu_offload: bool = False,
    ) -> None:
        self._num_shards, self._cpu_offload = num_shards, cpu_offload
        self.name = "fsdp" if num_shards == distributed.world_size() else "hsdp"
        super().__init__(model, make_optimizer, make_scheduler, device)

    def _wrap(self, device: torch.device, bucket_cap_mb: int | None) -> nn.Module:
        # `fully_shard` moves one unit at a time to the device, so the full model need not fit in its memory.
        mesh = create_mesh(device.type, self._num_shards)
        offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if self._cpu_offload else OffloadPolicy()
        for layer in self.model.blocks:
            fully_shard(layer, mesh=mesh, offload_policy=offload)
        self.model.always_run_vision = True
        fully_shard(self.model, mesh=mesh, offload_policy=offload)
        return self.model

    @contextlib.contextmanager
    def gradient_sync(self, last: bool) -> Iterator[None]:
        """See `Strategy`. With offload, every pack's gradients are reduced, to accumulate in host memory."""
        cast(FSDPModule, self.model).set_requires_gradient_sync(last or self._cpu_offload)
        yield
