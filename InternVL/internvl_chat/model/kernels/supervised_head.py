"""The language model's head at supervised tokens: losses, without logits and their gradient side by side.

The gradient of a token's loss is known, up to a factor, as soon as its logits are; it takes their place at
once. Where the head is frozen, nothing else needs it, so that a few tokens are in work at a time.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from internvl_chat.model.loss import losses_in_place

# Tokens in work at a time where the head is frozen: enough for a large matrix product.
_ROWS = 256


class HeadMemory:
    """Where a head puts what is large: here, in memory that is new each time."""

    def take_logits(self, rows: int, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return memory for logits, (rows, V), which nobody else writes to until it is given back."""
        return hidden.new_empty(rows, len(weight))

    def give_back(self, logits: torch.Tensor) -> None:
        """Take back what `take_logits` returned."""

    def weight_gradient(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor | None:
        """Return (V, U) times (U, C), the weight's gradient, or None if it was added to it."""
        return left @ right


class SupervisedHead(nn.Linear):
    """A linear head without bias that returns losses where targets are given.

    Attributes:
        memory: for the logits and the weight's gradient.
    """

    memory = HeadMemory()

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Return logits, (..., C) -> (..., V), or with targets (U,) the losses, (U, C) -> (U,) float32."""
        if targets is None:
            return super().forward(hidden)
        weight = self.weight
        if not torch.is_grad_enabled():
            # Or autograd would say that their gradients are needed.
            hidden, weight = hidden.detach(), weight.detach()
        return _HeadLosses.apply(hidden, weight, targets, self.memory)


class _HeadLosses(torch.autograd.Function):
    """Differentiable once, and once only: the backward pass lets go of what it needs."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, memory: HeadMemory
    ) -> torch.Tensor:
        """Return the losses; saves the gradients for a loss in which each token has the weight 1."""
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        count = len(hidden)
        rows = max(1, count if needs_weight else min(_ROWS, count))
        logits = memory.take_logits(min(rows, count), hidden, weight)
        losses = torch.empty(count, dtype=torch.float32, device=hidden.device)
        of_hidden = torch.empty_like(hidden) if needs_hidden else None
        for start in range(0, count, rows):
            part = slice(start, min(start + rows, count))
            scores = torch.mm(hidden[part], weight.t(), out=logits[: part.stop - start])
            losses[part] = losses_in_place(scores, targets[part], gradient=needs_hidden or needs_weight)
            if of_hidden is not None:
                torch.mm(scores, weight, out=of_hidden[part])
        if not needs_weight:
            memory.give_back(logits)
        ctx.memory, ctx.of_hidden, ctx.of_logits = memory, of_hidden, logits if needs_weight else None
        ctx.save_for_backward(hidden if needs_weight else None)
        return losses

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, upstream: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        """Weigh what was saved by the tokens' weights."""
        (hidden,) = ctx.saved_tensors
        if ctx.of_hidden is None and ctx.of_logits is None:
            raise RuntimeError("the losses of a head can be differentiated once only")
        weights = upstream.unsqueeze(1)
        of_hidden = of_weight = None
        if ctx.of_hidden is not None:
            of_hidden = ctx.of_hidden * weights.to(ctx.of_hidden.dtype)
        if ctx.of_logits is not None:
            of_weight = ctx.memory.weight_gradient(ctx.of_logits.t(), hidden * weights.to(hidden.dtype))
            ctx.memory.give_back(ctx.of_logits)
        ctx.of_hidden = ctx.of_logits = None
        return of_hidden, of_weight, None, None
