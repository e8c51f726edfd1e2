"""The root-mean-square norm in half precision, keeping its input and one number a token.

Written out in torch's operations, as transformers does, it keeps two more copies of each input, one of them
in float32: about a fifth of all activations of an 8B model.
"""

from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


def use_lean_norms(module: nn.Module) -> None:
    """Let all norms of a language model with the arithmetic of Llama's compute so in half precision."""
    for norm in module.modules():
        if type(norm).__name__.endswith("RMSNorm") and hasattr(norm, "variance_epsilon"):
            norm.forward = MethodType(_forward, norm)


def _forward(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """(..., C) -> (..., C)."""
    if hidden_states.element_size() != 2 or self.weight.dtype != hidden_states.dtype:
        return type(self).forward(self, hidden_states)
    if hidden_states.device.type != "cpu":
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
    return _RmsNorm.apply(hidden_states, self.weight, self.variance_epsilon)


# Tokens in work at a time, so that float32 copies stay in the cache.
_ROWS = 512


class _RmsNorm(torch.autograd.Function):
    """x / rms(x) in float32, rounded, times the weight, as transformers rounds."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """(..., C) -> (..., C)."""
        rows = x.reshape(-1, x.shape[-1])
        norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=torch.float32)
        scale = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        out, buffer = torch.empty_like(rows), _buffer(rows)
        for part in _parts(rows):
            out[part] = torch.mul(rows[part], scale[part], out=buffer[: part.stop - part.start])
            out[part].mul_(weight)
        ctx.save_for_backward(rows, weight, scale)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        """The normalised input is made again."""
        rows, weight, scale = ctx.saved_tensors
        upstream = gradient.reshape(rows.shape)
        needs_x, needs_weight, _ = ctx.needs_input_grad
        of_rows = torch.empty_like(rows) if needs_x else None
        of_weight = weight.new_zeros(1, len(weight), dtype=torch.float32) if needs_weight else None
        first, second, wide = _buffer(rows), _buffer(rows), weight.float()
        for part in _parts(rows):
            count = part.stop - part.start
            normalised = torch.mul(rows[part], scale[part], out=first[:count])
            work = second[:count].copy_(upstream[part])
            if of_weight is not None:
                of_weight.addmm_(wide.new_ones(1, count), normalised * work)
            if of_rows is not None:
                along = torch.linalg.vecdot(work.mul_(wide), normalised).unsqueeze(1).div_(len(weight))
                of_rows[part] = work.addcmul_(normalised, along, value=-1).mul_(scale[part])
        of_x = None if of_rows is None else of_rows.view(gradient.shape)
        return of_x, None if of_weight is None else of_weight[0].to(weight.dtype), None


def _parts(rows: torch.Tensor) -> Iterator[slice]:
    return (slice(i, min(i + _ROWS, len(rows))) for i in range(0, len(rows), _ROWS))


def _buffer(rows: torch.Tensor) -> torch.Tensor:
    return rows.new_empty(min(len(rows), _ROWS), rows.shape[1], dtype=torch.float32)
