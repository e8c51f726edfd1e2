"""Dropout that a CPU draws quickly: 16 random bits for each number instead of a float."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F


def drop(x: torch.Tensor, probability: float) -> tuple[torch.Tensor, float]:
    """Set each number to zero with a probability.

    On a CPU the probability of half-precision numbers is rounded to a multiple of 2^-16.

    Returns:
        What is left, and the factor that keeps its mean; where torch drops, it is in the numbers already.
    """
    drawn = round(probability * 2**16)
    if x.device.type != "cpu" or x.element_size() != 2 or not 0 < drawn < 2**16:
        return F.dropout(x, probability), 1.0
    return _BitDropout.apply(x, drawn), 1 / (1 - drawn / 2**16)


class _BitDropout(torch.autograd.Function):
    """Numbers and mask are handled as 16-bit integers, so that dropping is one bitwise operation."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, drawn: int) -> torch.Tensor:
        """Drop `drawn` of 2^16 numbers in the mean."""
        # Of the values below 2^15 the last `drawn` become 0, all others -1, which keeps every bit.
        first_dropped = 2**15 - drawn
        mask = _random_bits(x.numel()).clamp_(first_dropped - 1, first_dropped).sub_(first_dropped)
        mask = mask.view(x.shape)
        ctx.save_for_backward(mask)
        return _masked(x, mask)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Drop the same numbers of the gradient."""
        return _masked(gradient, *ctx.saved_tensors), None


# torch.compile cannot trace numpy's generators.
@torch.compiler.disable
def _random_bits(count: int) -> torch.Tensor:
    """Return so many random int16, by a generator that is seeded from torch's and more than twice as fast."""
    seed = int(torch.randint(2**63 - 1, ()))
    words = np.random.Generator(np.random.SFC64(seed)).integers(2**64, size=-(-count // 4), dtype=np.uint64)
    return torch.from_numpy(words.view(np.int16))[:count]


def _masked(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.bitwise_and(x.contiguous().view(torch.int16), mask).view(x.dtype)
