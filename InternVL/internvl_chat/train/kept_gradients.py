"""Gradients of the two vocabulary matrices in memory that is kept from step to step.

On a CPU, memory that is freed goes back to the system, and each new page costs more than filling it. These
two gradients are most of what a step allocates anew, and the first of them is nearly all zeros.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from internvl_chat.model.modeling import InternVLChatModel


def keep_vocabulary_gradients(model: InternVLChatModel) -> None:
    """Let embedding and head add to gradients that are kept, where they are trained.

    For one process: where gradients are exchanged, autograd has to hand them over itself.
    """
    words = model.language_model.get_input_embeddings()
    head = model.language_model.get_output_embeddings()
    kept = {id(module.weight): KeptGradient(module.weight) for module in (words, head)}
    if type(words) is nn.Embedding and words.weight.requires_grad:
        gradient = kept[id(words.weight)]
        words.forward = lambda ids: _Embedding.apply(ids, words.weight, gradient, words.padding_idx)
    if type(head) is nn.Linear and head.weight.requires_grad and head.bias is None:
        gradient_of_head = kept[id(head.weight)]
        head.forward = lambda x: _Linear.apply(x, head.weight, gradient_of_head)


class KeptGradient:
    """The gradient of one weight.

    Args:
        weight: whose `grad` is set when the first part of a step's gradient comes.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight
        self._memory: torch.Tensor | None = None

    def begin(self) -> tuple[torch.Tensor, bool]:
        """Return the gradient to add to, and whether what it holds is left over from an earlier step."""
        fresh = self.weight.grad is None
        if fresh:
            if self._memory is None:
                self._memory = torch.empty_like(self.weight)
            self.weight.grad = self._memory
        return self.weight.grad, fresh


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ids: torch.Tensor, weight: torch.Tensor, kept: KeptGradient, padding: int | None
    ) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.kept, ctx.padding = kept, padding
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, None, None]:
        (ids,) = ctx.saved_tensors
        if ctx.padding is not None:
            gradient = gradient.masked_fill((ids == ctx.padding).unsqueeze(-1), 0)
        total, left_over = ctx.kept.begin()
        if left_over:
            total.zero_()
        total.index_add_(0, ids.flatten(), gradient.flatten(0, -2))
        return None, None, None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, kept: KeptGradient) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.kept = kept
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        rows, inputs = gradient.flatten(0, -2), x.flatten(0, -2)
        total, left_over = ctx.kept.begin()
        if left_over:
            torch.mm(rows.t(), inputs, out=total)
        else:
            total.addmm_(rows.t(), inputs)
        return gradient @ weight if ctx.needs_input_grad[0] else None, None, None
