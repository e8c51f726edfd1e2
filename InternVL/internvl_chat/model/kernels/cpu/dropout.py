"""Dropout of 16-bit floats on a CPU, with 16 random bits per number instead of a float.

Gain over torch's dropout: 10 % of a LoRA step, 4 % of it through the SFC64 generator.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F


def drop(x: torch.Tensor, probability: float) -> tuple[torch.Tensor, float]:
    """Set each number to zero with the given probability, without rescaling the others.

    For 16-bit floats on a CPU the probability is rounded to a multiple of 2^-16.

    Returns:
        The numbers, and the factor that restores their mean; 1 where torch's dropout has applied it already.
    """
    dropped = round(probability * 2**16)
    if x.device.type != "cpu" or x.element_size() != 2 or not 0 < dropped < 2**16:
        return F.dropout(x, probability), 1.0
    return _BitDropout.apply(x, dropped), 1 / (1 - dropped / 2**16)


class _BitDropout(torch.autograd.Function):
    """Treats numbers and mask as 16-bit integers, so that masking is one bitwise operation."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dropped: int) -> torch.Tensor:
        """Drop each number with probability `dropped` / 2^16."""
        # Random values among the largest `dropped` become 0; all others become -1, which keeps every bit.
        first_dropped = 2**15 - dropped
        mask = _random_bits(x.numel()).clamp_(first_dropped - 1, first_dropped).sub_(first_dropped)
        mask = mask.view(x.shape)
        ctx.save_for_backward(mask)
        return _masked(x, mask)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Mask the gradient as the input was."""
        return _masked(gradient, *ctx.saved_tensors), None


# torch.compile cannot trace numpy's generators.
@torch.compiler.disable
def _random_bits(count: int) -> torch.Tensor:
    """Return random int16 from SFC64, seeded by torch's generator and more than twice as fast."""
    seed = int(torch.randint(2**63 - 1, ()))
    words = np.random.Generator(np.random.SFC64(seed)).integers(2**64, size=-(-count // 4), dtype=np.uint64)
    return torch.from_numpy(words.view(np.int16))[:count]


def _masked(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.bitwise_and(x.contiguous().view(torch.int16), mask).view(x.dtype)
