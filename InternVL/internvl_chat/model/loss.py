"""The training loss: next-token cross-entropy in which records, not tokens, are what is weighed.

A step's loss is sum(w_t * loss_t) / sum(w_t) over all supervised tokens t of the step, on every process.
`sample` weighs a token by 1 / n, n being the supervised tokens of its record, so that each record counts
the same; `square` by 1 / sqrt(n); `token` by 1 (InternVL 2.5, section 3.3).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

LOSS_REDUCTIONS = ("sample", "token", "square")

_EXPONENT = {"token": 0.0, "square": 0.5, "sample": 1.0}


def token_weight(num_supervised: int, reduction: str) -> float:
    """Return the weight of each supervised token of a record with that many of them.

    >>> token_weight(4, "sample"), token_weight(4, "square"), token_weight(4, "token")
    (0.25, 0.5, 1.0)
    """
    return num_supervised ** -_EXPONENT[reduction]


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of each token, computed in float32 without a float32 copy of all logits.

    Args:
        logits: (U, V) in any dtype.
        targets: (U,) int64.

    Returns:
        (U,) float32.
    """
    return _TokenLosses.apply(logits, targets)


# Float32 logits in work at a time: what fits a CPU's caches, and few launches on a GPU.
_CHUNK_BYTES = {"cpu": 1 << 23, "cuda": 1 << 28}


def _chunks(logits: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield the rows in parts, each with its float32 copy, which only lasts until the next."""
    rows = max(1, _CHUNK_BYTES.get(logits.device.type, 1 << 28) // (4 * logits.shape[1]))
    # One buffer for all parts: memory that is new each time costs a CPU more than the arithmetic.
    buffer = logits.new_empty(min(rows, len(logits)), logits.shape[1], dtype=torch.float32)
    for start in range(0, len(logits), rows):
        part = logits[start : start + rows]
        yield slice(start, start + len(part)), buffer[: len(part)].copy_(part)


class _TokenLosses(torch.autograd.Function):
    """Keeps the logits in their own dtype for the backward pass, and what normalises them."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        normalizers = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        for rows, part in _chunks(logits):
            largest = part.amax(dim=1)
            normalizers[rows] = part.sub_(largest.unsqueeze(1)).exp_().sum(dim=1).log_().add_(largest)
        ctx.save_for_backward(logits, targets, normalizers)
        return normalizers - logits.gather(1, targets.unsqueeze(1)).squeeze(1).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, targets, normalizers = ctx.saved_tensors
        out = torch.empty_like(logits)
        for rows, part in _chunks(logits):
            part.sub_(normalizers[rows].unsqueeze(1)).exp_()
            part.scatter_add_(1, targets[rows].unsqueeze(1), part.new_full((len(part), 1), -1.0))
            out[rows] = part.mul_(gradient[rows].unsqueeze(1))
        return out, None
