"""What is as large as the vocabulary, in memory that is kept from step to step.

On a CPU, memory that is freed goes back to the system, and each new page costs more than filling it. Logits
and the gradients of embedding and head are most of what a step allocates anew, and the gradient of the
embedding is nearly all zeros.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from internvl_chat.model.kernels.supervised_head import HeadMemory, SupervisedHead
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel


def use_persistent_buffers(model: InternVLChatModel) -> None:
    """Let embedding and head use the same memory in every step, their gradients included if trained.

    For one process: where gradients are exchanged, autograd has to hand them over itself.
    """
    words = model.language_model.get_input_embeddings()
    head = model.language_model.get_output_embeddings()
    kept = {id(module.weight): KeptGradient(module.weight) for module in (words, head)}
    if type(words) is nn.Embedding and words.weight.requires_grad:
        words.__class__ = KeptEmbedding
        words.kept = kept[id(words.weight)]
    if isinstance(head, SupervisedHead):
        head.memory = KeptHeadMemory(kept[id(head.weight)])


class KeptGradient:
    """The gradient of one weight.

    Args:
        weight: whose `grad` is set when the first part of a step's gradient comes.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight
        self._memory: torch.Tensor | None = None

    def add_rows(self, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Add (N, C) to the rows of these numbers, (N,)."""
        total, left_over = self._begin()
        if left_over:
            total.zero_()
        total.index_add_(0, rows, values)

    def add_product(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """Add the product of two matrices."""
        total, left_over = self._begin()
        if left_over:
            torch.mm(left, right, out=total)
        else:
            total.addmm_(left, right)

    def _begin(self) -> tuple[torch.Tensor, bool]:
        """Return the gradient to add to, and whether what it holds is left over from an earlier step."""
        fresh = self.weight.grad is None
        if fresh:
            if self._memory is None:
                self._memory = torch.empty_like(self.weight)
            self.weight.grad = self._memory
        return self.weight.grad, fresh


class KeptHeadMemory(HeadMemory):
    """Memory of a head that grows to what the largest pack needs and is then used again.

    Args:
        gradient: of the head's weight.
    """

    def __init__(self, gradient: KeptGradient) -> None:
        self._gradient = gradient
        self._free: torch.Tensor | None = None

    def take_logits(self, rows: int, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the memory that is free, if it is large enough."""
        if torch.is_inference_mode_enabled():
            return super().take_logits(rows, hidden, weight)  # it could not be used in training
        free, self._free = self._free, None
        count = rows * len(weight)
        if free is None or free.numel() < count or free.dtype != hidden.dtype:
            free = hidden.new_empty(count)
        return free[:count].view(rows, len(weight))

    def give_back(self, logits: torch.Tensor) -> None:
        """Keep the memory for later."""
        if torch.is_inference_mode_enabled():
            return
        self._free = logits.new_empty(0).set_(logits.untyped_storage())

    def weight_gradient(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """Add it where it is kept."""
        self._gradient.add_product(left, right)


class KeptEmbedding(nn.Embedding):
    """An embedding whose gradient is added to what is kept.

    Attributes:
        kept: its gradient.
    """

    kept: KeptGradient

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(..., T) -> (..., T, C)."""
        return _Embedding.apply(ids, self.weight, self.kept, self.padding_idx)


class _Embedding(torch.autograd.Function):
    """Looks up rows, and adds their gradients where they are kept."""

    @staticmethod
    def forward(
        ctx: Any, ids: torch.Tensor, weight: torch.Tensor, kept: KeptGradient, padding: int | None
    ) -> torch.Tensor:
        """(..., T) -> (..., T, C)."""
        ctx.save_for_backward(ids)
        ctx.kept, ctx.padding = kept, padding
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, None, None]:
        """Add the rows' gradients; the padding token has none."""
        (ids,) = ctx.saved_tensors
        if ctx.padding is not None:
            gradient = gradient.masked_fill((ids == ctx.padding).unsqueeze(-1), 0)
        ctx.kept.add_rows(ids.flatten(), gradient.flatten(0, -2))
        return None, None, None, None
