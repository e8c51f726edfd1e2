"""How a model trains on several devices: what the training loop needs, and DDP.

`FSDPStrategy` and `DeepSpeedStrategy` override what differs. A strategy owns the model, the optimizer and
the learning-rate scheduler.
"""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler

from internvl_chat.model.modeling_internvl_chat import InternVLChatModel
from internvl_chat.utils import distributed

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
MakeScheduler = Callable[[torch.optim.Optimizer], LRScheduler]


class Strategy(Protocol):
    """What the training loop, checkpoints and validation need of a parallel layout.

    Attributes:
        name: `single`, `ddp`, `fsdp` or `deepspeed`.
        model: the model itself, without wrapper.
        wrapped: the module whose forward pass trains.
        optimizer: of the trained parameters.
        scheduler: of the learning rate.
        shards_weights: whether a rank holds only a part of each weight outside of the forward pass; all
            ranks must then run the same modules.
    """

    name: str
    model: InternVLChatModel
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    shards_weights: bool

    def gradient_sync(self, last: bool) -> AbstractContextManager:
        """Return the context of a forward and backward pass: gradients are reduced after the last only."""

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass within `gradient_sync`."""

    def clip_gradients(self, max_norm: float) -> float:
        """Clip to a total norm (0 clips nothing); returns the norm before clipping."""

    def optimizer_step(self) -> None:
        """Step the optimizer; the scheduler is stepped by `scheduler_step`."""

    def scheduler_step(self) -> None:
        """Step the learning-rate schedule, after skipped steps too."""

    def zero_grad(self) -> None:
        """Free the gradients."""

    def full_weights(self) -> dict[str, Tensor]:
        """Return all weights by name, unsharded; a collective.

        Where weights are sharded they are on the CPU of rank 0, and other ranks get an empty dictionary;
        otherwise they are the live parameters.
        """


class ReplicatedStrategy:
    """One process, or several that each hold all weights (DDP).

    Args:
        model: on its device, with its trained parameters chosen.
        make_optimizer: is given the model.
        make_scheduler: is given the optimizer.
        device: of this process.
        bucket_cap_mb: size of DDP's gradient buckets; None for torch's default.
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
        self.name = "ddp" if distributed.world_size() > 1 else "single"
        self.wrapped: nn.Module = model
        if self.name == "ddp":
            # Gradients are views of the buckets, so that they are in memory once.
            self.wrapped = DistributedDataParallel(
                model,
                device_ids=[device] if device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                bucket_cap_mb=bucket_cap_mb,
            )
        self.optimizer = make_optimizer(model)
        self.scheduler = make_scheduler(self.optimizer)

    def gradient_sync(self, last: bool) -> AbstractContextManager:
        """See `Strategy`."""
        return contextlib.nullcontext() if last or self.name == "single" else self.wrapped.no_sync()

    def backward(self, loss: Tensor) -> None:
        """See `Strategy`."""
        loss.backward()

    def clip_gradients(self, max_norm: float) -> float:
        """See `Strategy`."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        if max_norm > 0:
            norm = nn.utils.clip_grad_norm_(parameters, max_norm)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in parameters])
        return float(full_tensor(norm))

    def optimizer_step(self) -> None:
        """See `Strategy`."""
        self.optimizer.step()

    def scheduler_step(self) -> None:
        """See `Strategy`."""
        self.scheduler.step()

    def zero_grad(self) -> None:
        """See `Strategy`."""
        self.optimizer.zero_grad(set_to_none=True)

    def full_weights(self) -> dict[str, Tensor]:
        """See `Strategy`."""
        return dict(self.model.state_dict())


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a sharded tensor (DTensor) gathered on every rank, any other tensor as it is."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()
