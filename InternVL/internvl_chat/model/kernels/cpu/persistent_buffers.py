"""Reusable buffers for logits and vocabulary-sized gradients (CPU only).

Freed memory goes back to the operating system, and page faults on new memory take longer than filling it. The
logits and the gradients of the embedding and the head account for most of the memory that a step allocates.

Speedup: 1.03x for a LoRA step, 1.09x for a full training step.

Shapes: T tokens per row, N tokens in all rows, C hidden size, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from internvl_chat.model.kernels.supervised_head import HeadBuffers, SupervisedHead


def use_persistent_buffers(llm: PreTrainedModel) -> None:
    """Make the embedding and the head reuse their gradient buffers, and the head also its logits buffer.

    This is for a single rank only, because reducing gradients across ranks requires that autograd returns
    them.
    """
    embedding, head = llm.get_input_embeddings(), llm.get_output_embeddings()
    weights = [module.get_parameter("weight") for module in (embedding, head)]
    gradients = {id(weight): PersistentGradient(weight) for weight in weights}
    if type(embedding) is nn.Embedding and embedding.weight.requires_grad:
        llm.set_input_embeddings(PersistentEmbedding(embedding, gradients[id(embedding.weight)]))
    if isinstance(head, SupervisedHead):
        head.head_buffers = PersistentHeadBuffers(gradients[id(head.weight)])


class PersistentGradient:
    """Gradient of a weight, accumulated in a buffer that is reused in every step.

    Args:
        weight: parameter; its `grad` is set to the buffer when the first gradient of a step is added.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight
        self._buffer: torch.Tensor | None = None

    def add_rows(self, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Add values (N, C) to the rows with indices (N,)."""
        total, stale = self._begin()
        if stale:
            total.zero_()
        total.index_add_(0, rows, values)

    def add_product(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """Add the product of two matrices."""
        total, stale = self._begin()
        if stale:
            torch.mm(left, right, out=total)
        else:
            total.addmm_(left, right)

    def _begin(self) -> tuple[torch.Tensor, bool]:
        """Return the buffer, and whether its content is stale (uninitialized or from an earlier step)."""
        if self.weight.grad is not None:
            return self.weight.grad, False
        if self._buffer is None:
            self._buffer = torch.empty_like(self.weight)
        self.weight.grad = self._buffer
        return self._buffer, True


class PersistentHeadBuffers(HeadBuffers):
    """Reusable buffers of a head; they grow to the size needed for the largest pack so far."""

    def __init__(self, gradient: PersistentGradient) -> None:
        self._gradient = gradient
        self._free: torch.Tensor | None = None

    def take_logits(self, rows: int, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the free buffer if it is large enough, otherwise a new one."""
        if torch.is_inference_mode_enabled():
            return super().take_logits(rows, hidden, weight)  # inference tensors cannot be used in training
        free, self._free = self._free, None
        count = rows * len(weight)
        if free is None or free.numel() < count or free.dtype != hidden.dtype:
            free = hidden.new_empty(count)
        return free[:count].view(rows, len(weight))

    def give_back(self, logits: torch.Tensor) -> None:
        """Keep the buffer for the next call."""
        if torch.is_inference_mode_enabled():
            return
        self._free = logits.new_empty(0).set_(logits.untyped_storage())

    def weight_gradient(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """Add the product to the persistent gradient."""
        self._gradient.add_product(left, right)


class PersistentEmbedding(nn.Embedding):
    """Embedding that accumulates its gradient in a persistent buffer.

    Args:
        embedding: embedding to replace; its weight is shared.
        gradient: persistent gradient of this weight.
    """

    def __init__(self, embedding: nn.Embedding, gradient: PersistentGradient) -> None:
        super().__init__(
            embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx, device="meta"
        )
        self.weight, self.gradient = embedding.weight, gradient

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(..., T) -> (..., T, C)."""
        return _Embedding.apply(ids, self.weight, self.gradient, self.padding_idx)


class _Embedding(torch.autograd.Function):
    """Embedding lookup whose backward pass adds to a persistent gradient."""

    @staticmethod
    def forward(
        ctx: Any, ids: torch.Tensor, weight: torch.Tensor, total: PersistentGradient, padding: int | None
    ) -> torch.Tensor:
        """(..., T) -> (..., T, C)."""
        ctx.save_for_backward(ids)
        ctx.total, ctx.padding = total, padding
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, None, None]:
        """Add the gradients to the rows of their tokens, except the padding token."""
        (ids,) = ctx.saved_tensors
        if ctx.padding is not None:
            gradient = gradient.masked_fill((ids == ctx.padding).unsqueeze(-1), 0)
        ctx.total.add_rows(ids.flatten(), gradient.flatten(0, -2))
        return None, None, None, None
