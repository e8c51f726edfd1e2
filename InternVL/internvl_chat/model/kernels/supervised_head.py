"""The last MLP, the head and the cross-entropy, computed at supervised positions only.

The last layer's attention needs all other positions only as keys and values.

The forward pass overwrites the logits z with the gradient of the unweighted loss, softmax(z) - onehot(y), so
that logits and gradient are never in memory together. The backward pass multiplies this gradient by each
token's loss weight. If the head is frozen, the logits are computed in chunks of `_ROWS` rows.

Shapes: B rows, T tokens, U supervised positions, C hidden size, V vocabulary.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.modeling_layers import GradientCheckpointingLayer

from internvl_chat.model.kernels.cross_entropy import cross_entropy_in_place

# Rows of logits per chunk with a frozen head: enough for an efficient matrix product.
_ROWS = 256


class LastLayer(GradientCheckpointingLayer):
    """Pre-norm decoder layer whose MLP runs only at selected positions.

    Args:
        layer: Llama, Mistral or Qwen layer; its modules are reused, so parameter names do not change.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.self_attn, self.mlp = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
        self.input_layernorm = layer.get_submodule("input_layernorm")
        self.post_attention_layernorm = layer.get_submodule("post_attention_layernorm")

    def forward(
        self, hidden_states: torch.Tensor, output_positions: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """(B, T, C) -> (B, T, C), or (1, T, C) -> (1, U, C) with `output_positions` (U,)."""
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        if output_positions is not None:
            hidden_states = hidden_states[:, output_positions]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class HeadBuffers:
    """Allocator for the large tensors of an LM head; this class allocates new ones on every call."""

    def take_logits(self, rows: int, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return a buffer for logits (rows, V) that is not reused until `give_back`."""
        return hidden.new_empty(rows, len(weight))

    def give_back(self, logits: torch.Tensor) -> None:
        """Take back a buffer from `take_logits`."""

    def weight_gradient(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor | None:
        """Return the weight's gradient, (V, U) @ (U, C); None if it was accumulated in place."""
        return left @ right


class SupervisedHead(nn.Linear):
    """Linear head without bias that returns losses if targets are given.

    Attributes:
        head_buffers: allocator of the logits and the weight's gradient.
    """

    head_buffers = HeadBuffers()

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Return logits, (..., C) -> (..., V), or, given targets (U,), float32 losses, (U, C) -> (U,)."""
        if targets is None:
            return super().forward(hidden)
        weight = self.weight
        if not torch.is_grad_enabled():
            # Otherwise `needs_input_grad` would be True even under `no_grad`.
            hidden, weight = hidden.detach(), weight.detach()
        return _HeadLosses.apply(hidden, weight, targets, self.head_buffers)


class _HeadLosses(torch.autograd.Function):
    """Head and cross-entropy in one step; the backward pass frees the gradients, so it can run only once."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, buffers: HeadBuffers
    ) -> torch.Tensor:
        """Return the losses (U,) and save the gradients of their unweighted sum."""
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        rows = max(1, len(hidden) if needs_weight else min(_ROWS, len(hidden)))
        logits = buffers.take_logits(min(rows, len(hidden)), hidden, weight)
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        hidden_grad = torch.empty_like(hidden) if needs_hidden else None
        for start in range(0, len(hidden), rows):
            part = slice(start, min(start + rows, len(hidden)))
            z = torch.mm(hidden[part], weight.t(), out=logits[: part.stop - start])
            losses[part] = cross_entropy_in_place(z, targets[part], gradient=needs_hidden or needs_weight)
            if hidden_grad is not None:
                torch.mm(z, weight, out=hidden_grad[part])
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
        """Multiply the saved gradients by the upstream gradient of each token's loss."""
        (hidden,) = ctx.saved_tensors
        if ctx.hidden_grad is None and ctx.logits_grad is None:
            raise RuntimeError("the losses of a supervised head can be differentiated only once")
        weights = upstream.unsqueeze(1)
        hidden_grad = weight_grad = None
        if ctx.hidden_grad is not None:
            hidden_grad = ctx.hidden_grad * weights.to(ctx.hidden_grad.dtype)
        if ctx.logits_grad is not None:
            weight_grad = ctx.buffers.weight_gradient(ctx.logits_grad.t(), hidden * weights.to(hidden.dtype))
            ctx.buffers.give_back(ctx.logits_grad)
        ctx.hidden_grad = ctx.logits_grad = None
        return hidden_grad, weight_grad, None, None
