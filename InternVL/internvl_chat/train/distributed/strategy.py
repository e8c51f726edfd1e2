"""Parallel training strategies: a single rank and DDP here, FSDP2 and DeepSpeed in subclasses."""

import contextlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler

from internvl_chat.model.modeling_internvl_chat import InternVLChatModel
from internvl_chat.utils import distributed

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
MakeScheduler = Callable[[torch.optim.Optimizer], LRScheduler]


class Strategy:
    """Trains on a single rank, or with DDP on several ranks; base class of the other strategies.

    Args:
        model: model on any device, after `set_trainable`.
        bucket_cap_mb: size of DDP's gradient buckets in MB; None for torch's default.

    Attributes:
        name: `single`, `ddp`, `fsdp`, `hsdp` or `deepspeed`.
        model: the unwrapped model.
        wrapped: the module to call for training.
        shards_weights: whether the forward pass gathers sharded weights, so that all ranks must run the same
            modules.
    """

    shards_weights = False

    def __init__(
        self,
        model: InternVLChatModel,
        make_optimizer: MakeOptimizer,
        make_scheduler: MakeScheduler,
        device: torch.device,
        bucket_cap_mb: int | None = None,
    ) -> None:
        self.model = model
        self.wrapped = self._wrap(device, bucket_cap_mb)
        self.optimizer = make_optimizer(model)
        self.scheduler = make_scheduler(self.optimizer)

    def _wrap(self, device: torch.device, bucket_cap_mb: int | None) -> nn.Module:
        """Move the model to the device and parallelize it; return the module to call for training."""
        self.model.to(device)
        self.name = "ddp" if distributed.world_size() > 1 else "single"
        if self.name == "single":
            return self.model
        # With gradients as views of the buckets, each gradient is stored only once.
        return DistributedDataParallel(
            self.model,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            bucket_cap_mb=bucket_cap_mb,
        )

    def gradient_sync(self, last: bool) -> AbstractContextManager:
        """Return the context for one forward and backward pass; only the last pass reduces the gradients."""
        if last or not isinstance(self.wrapped, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.wrapped.no_sync()

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass. Call it inside `gradient_sync`."""
        loss.backward()

    def clip_gradients(self, max_norm: float) -> float:
        """Clip the gradients to a total norm (0: do not clip); return the norm before clipping."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        return float(full_tensor(nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)))

    def step(self, *, apply: bool) -> None:
        """Update the weights if `apply` is True, advance the schedule, and clear the gradients."""
        if apply:
            self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor (DTensor) on every rank; return any other tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor; return any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
