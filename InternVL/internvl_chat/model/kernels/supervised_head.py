"""The language model's head fused with the cross-entropy, for labeled positions.

The gradient of a token's loss is known, up to a factor, as soon as its logits are, and overwrites them:
logits and their gradient are never in memory together. With a frozen head, only a few rows of logits are in
memory at a time.

Shapes: U labeled positions, C hidden size, V vocabulary.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from internvl_chat.model.loss import losses_in_place

# Rows of logits at a time with a frozen head: enough for an efficient matrix product.
_ROWS = 256


class HeadBuffers:
    """Allocates the large tensors of a head; here, anew in each call."""

    def take_logits(self, rows: int, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return a buffer for logits (rows, V), exclusive until `give_back`."""
        return hidden.new_empty(rows, len(weight))

    def give_back(self, logits: torch.Tensor) -> None:
        """Accept the buffer that `take_logits` returned."""

    def weight_gradient(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor | None:
        """Return the weight's gradient, (V, U) @ (U, C), or None if it was accumulated already."""
        return left @ right


class SupervisedHead(nn.Linear):
    """A linear head without bias that returns losses if targets are given.

    Attributes:
        buffers: for the logits and the weight's gradient.
    """

    buffers = HeadBuffers()

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Return logits, (..., C) -> (..., V), or with targets (U,) the losses, (U, C) -> (U,) float32."""
        if targets is None:
            return super().forward(hidden)
        weight = self.weight
        if not torch.is_grad_enabled():
            # Otherwise `needs_input_grad` is True.
            hidden, weight = hidden.detach(), weight.detach()
        return _HeadLosses.apply(hidden, weight, targets, self.buffers)


class _HeadLosses(torch.autograd.Function):
    """Differentiable once only: the backward pass frees what it needs."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, buffers: HeadBuffers
    ) -> torch.Tensor:
        """Return the losses (U,); saves the gradients of their unweighted sum."""
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        count = len(hidden)
        rows = max(1, count if needs_weight else min(_ROWS, count))
        logits = buffers.take_logits(min(rows, count), hidden, weight)
        losses = torch.empty(count, dtype=torch.float32, device=hidden.device)
        hidden_grad = torch.empty_like(hidden) if needs_hidden else None
        for start in range(0, count, rows):
            part = slice(start, min(start + rows, count))
            scores = torch.mm(hidden[part], weight.t(), out=logits[: part.stop - start])
            losses[part] = losses_in_place(scores, targets[part], gradient=needs_hidden or needs_weight)
            if hidden_grad is not None:
                torch.mm(scores, weight, out=hidden_grad[part])
        if not needs_weight:
            buffers.give_back(logits)
        ctx.buffers, ctx.hidden_grad, ctx.logits_grad = buffers, hidden_grad, logits if needs_weight else None
        ctx.save_for_backward(hidden if needs_weight else None)
        return losses

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, upstream: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        """Scale the saved gradients by the tokens' weights."""
        (hidden,) = ctx.saved_tensors
        if ctx.hidden_grad is None and ctx.logits_grad is None:
            raise RuntimeError("the losses of a head can be differentiated once only")
        weights = upstream.unsqueeze(1)
        hidden_grad = weight_grad = None
        if ctx.hidden_grad is not None:
            hidden_grad = ctx.hidden_grad * weights.to(ctx.hidden_grad.dtype)
        if ctx.logits_grad is not None:
            weight_grad = ctx.buffers.weight_gradient(ctx.logits_grad.t(), hidden * weights.to(hidden.dtype))
            ctx.buffers.give_back(ctx.logits_grad)
        ctx.hidden_grad = ctx.logits_grad = None
        return hidden_grad, weight_grad, None, None
