"""Pixel shuffle and projector match explicit loops and formulas."""

import math

import pytest
import torch
from helpers import assert_within_rounding, terms_of

from internvl_chat.model.projector import build_projector, pixel_shuffle


def folded_by_hand(x: torch.Tensor, block: int) -> torch.Tensor:
    """Flatten each block x block neighborhood of (N, W, H, C) to a vector, with H as the inner axis."""
    n, w, h, c = x.shape
    out = torch.empty(n, w // block, h // block, c * block * block)
    for tile in range(n):
        for i in range(w // block):
            for j in range(h // block):
                features = []
                for di in range(block):
                    for dj in range(block):
                        features += x[tile, i * block + di, j * block + dj].tolist()
                out[tile, i, j] = torch.tensor(features)
    return out


@pytest.mark.parametrize("block", [1, 2, 4])
@pytest.mark.parametrize(("w", "h"), [(4, 8), (8, 4), (4, 4)])
def test_neighboring_patches_become_one_token(w: int, h: int, block: int) -> None:
    x = torch.arange(2 * w * h * 8, dtype=torch.float32).reshape(2, w, h, 8)
    expected = folded_by_hand(x, block)
    assert torch.equal(pixel_shuffle(x, 1 / block, "v2"), expected)
    # v1 equals v2 with swapped spatial axes.
    swapped = torch.stack([torch.stack([t[:, j] for j in range(t.shape[1])]) for t in expected])
    assert torch.equal(pixel_shuffle(x, 1 / block, "v1"), swapped)


def test_the_smallest_case_number_by_number() -> None:
    x = torch.tensor([[[[0.0, 1], [2, 3], [4, 5], [6, 7]], [[8, 9], [10, 11], [12, 13], [14, 15]]]])
    assert x.shape == (1, 2, 4, 2)
    left, right = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]
    assert pixel_shuffle(x, 0.5, "v2").tolist() == [[[left, right]]]
    assert pixel_shuffle(x, 0.5, "v1").tolist() == [[[left], [right]]]


def test_projector_is_norm_linear_gelu_linear() -> None:
    torch.manual_seed(0)
    projector = build_projector(vision_width=6, llm_width=10, ratio=0.5)
    shapes = {name: tuple(p.shape) for name, p in projector.named_parameters()}
    assert shapes == {
        "0.weight": (24,),
        "0.bias": (24,),
        "1.weight": (10, 24),
        "1.bias": (10,),
        "3.weight": (10, 10),
        "3.bias": (10,),
    }
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.normal_()
        x = torch.randn(5, 24)
        weights = {name: p.double() for name, p in projector.named_parameters()}
        y = x.double()
        y = (y - y.mean(-1, keepdim=True)) / torch.sqrt(y.var(-1, keepdim=True, unbiased=False) + 1e-5)
        y = y * weights["0.weight"] + weights["0.bias"]
        y = y @ weights["1.weight"].T + weights["1.bias"]
        y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
        y = y @ weights["3.weight"].T + weights["3.bias"]
        assert_within_rounding(projector(x), y, terms_of(projector))


def test_projector_of_another_ratio() -> None:
    assert build_projector(4, 10, 0.25)(torch.zeros(3, 64)).shape == (3, 10)
    assert build_projector(4, 10, 1.0)(torch.zeros(3, 4)).shape == (3, 10)
