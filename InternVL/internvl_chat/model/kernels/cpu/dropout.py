"""Dropout of 16-bit floats on a CPU, using 16 random bits per element instead of a random float.

Compared with torch's dropout, this saves 10% of the time of a LoRA step. The SFC64 generator contributes 4 of
these percentage points.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F


def drop(x: torch.Tensor, probability: float) -> tuple[torch.Tensor, float]:
    """Zero each element with the given probability.

    For 16-bit floats on a CPU, the probability is rounded to a multiple of 2^-16.

    Returns:
        The result, and the factor by which the caller must still scale it; 1 if torch's dropout was used.
    """
    dropped = round(probability * 2**16)
    if x.device.type != "cpu" or x.element_size() != 2 or not 0 < dropped < 2**16:
        return F.dropout(x, probability), 1.0
    return _BitDropout.apply(x, dropped), 1 / (1 - dropped / 2**16)


class _BitDropout(torch.autograd.Function):
    """Dropout by bit masking: the values are viewed as int16, so applying the mask is one bitwise AND."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dropped: int) -> torch.Tensor:
        """Drop each element with probability `dropped` / 2^16."""
        # The `dropped` largest int16 values become 0; all others become -1 (all bits set), which keeps x.
        first_dropped = 2**15 - dropped
        mask = _random_bits(x.numel()).clamp_(first_dropped - 1, first_dropped).sub_(first_dropped)
        mask = mask.view(x.shape)
        ctx.save_for_backward(mask)
        return _masked(x, mask)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Apply the mask of the forward pass to the gradient."""
        return _masked(gradient, *ctx.saved_tensors), None


# torch.compile cannot trace numpy's generators.
@torch.compiler.disable
def _random_bits(count: int) -> torch.Tensor:
    """Return random int16 values from SFC64 (over twice as fast as torch), seeded by torch's generator."""
    seed = int(torch.randint(2**63 - 1, ()))
    words = np.random.Generator(np.random.SFC64(seed)).integers(2**64, size=-(-count // 4), dtype=np.uint64)
    return torch.from_numpy(words.view(np.int16))[:count]


def _masked(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.bitwise_and(x.contiguous().view(torch.int16), mask).view(x.dtype)
