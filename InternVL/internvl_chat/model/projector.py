"""Projector from vision-tower patches to language-model tokens: pixel shuffle, then `mlp1`.

Shapes: N tiles, W x H patches, C features per patch, r downsample ratio (0.5 in InternVL3).
"""

import torch
from torch import nn


def pixel_shuffle(x: torch.Tensor, ratio: float, version: str) -> torch.Tensor:
    """Concatenate the features of 1/r x 1/r neighboring patches into one token.

    Args:
        x: (N, W, H, C).
        ratio: r, at most 1.
        version: `v1` swaps the two spatial axes, as in the first InternVL-Chat models; `v2` does not.

    Returns:
        (N, W * r, H * r, C / r^2), or (N, H * r, W * r, C / r^2) for v1.

    Four patches with one feature each become one token with four features, in row-major order:

    >>> pixel_shuffle(torch.arange(4).view(1, 2, 2, 1), 0.5, "v2").flatten().tolist()
    [0, 1, 2, 3]

    >>> pixel_shuffle(torch.zeros(2, 32, 32, 1024), 0.5, "v2").shape
    torch.Size([2, 16, 16, 4096])
    """
    n, w, h, c = x.shape
    x = x.reshape(n, w, int(h * ratio), int(c / ratio)).transpose(1, 2)
    x = x.reshape(n, int(h * ratio), int(w * ratio), int(c / ratio**2))
    return x if version == "v1" else x.transpose(1, 2).contiguous()


def build_projector(vision_width: int, llm_width: int, ratio: float) -> nn.Sequential:
    """Return `mlp1`, LayerNorm - Linear - GELU - Linear: (..., C / r^2) -> (..., llm_width)."""
    folded = vision_width * int(1 / ratio) ** 2
    return nn.Sequential(
        nn.LayerNorm(folded), nn.Linear(folded, llm_width), nn.GELU(), nn.Linear(llm_width, llm_width)
    )
