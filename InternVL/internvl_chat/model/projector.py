"""From the vision tower's patches to the language model's tokens: pixel shuffle, then `mlp1`.

Shapes: N tiles, W x H patches, C features; r = down-sample ratio (0.5).
"""

import torch
from torch import nn


def pixel_shuffle(x: torch.Tensor, ratio: float, version: str) -> torch.Tensor:
    """Fold 1/r x 1/r neighbouring patches into the features of one token (InternVL, v1 and v2).

    v1 leaves the two spatial axes swapped, as the first InternVL-Chat models were trained; v2 does not.

    Args:
        x: (N, W, H, C).
        ratio: r, at most 1.
        version: `v1` or `v2`.

    Returns:
        (N, W * r, H * r, C / r^2), axes swapped for v1.

    >>> pixel_shuffle(torch.zeros(2, 32, 32, 1024), 0.5, "v2").shape
    torch.Size([2, 16, 16, 4096])
    """
    n, w, h, c = x.shape
    x = x.reshape(n, w, int(h * ratio), int(c / ratio)).transpose(1, 2)
    x = x.reshape(n, int(h * ratio), int(w * ratio), int(c / ratio**2))
    return x if version == "v1" else x.transpose(1, 2).contiguous()


def build_projector(vision_width: int, llm_width: int, ratio: float) -> nn.Sequential:
    """Return `mlp1`: normalisation, linear, GELU, linear; (..., C / r^2) -> (..., llm_width)."""
    folded = vision_width * int(1 / ratio) ** 2
    return nn.Sequential(
        nn.LayerNorm(folded), nn.Linear(folded, llm_width), nn.GELU(), nn.Linear(llm_width, llm_width)
    )
