"""16-bit dropout: dropped fraction, scale, gradient, and cases delegated to torch."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from internvl_chat.model.kernels.cpu.dropout import drop

HALF = (torch.bfloat16, torch.float16)
# Half a unit in the last place, relative.
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


def ones(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


def dropout(x: torch.Tensor, probability: float) -> torch.Tensor:
    left, factor = drop(x, probability)
    return left * factor


def seeded(x: torch.Tensor, probability: float, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return dropout(x, probability)


@pytest.mark.parametrize("probability", [2**-16, 0.001, 0.05, 0.3, 0.5, 0.9, 0.999])
def test_dropped_fraction(probability: float) -> None:
    numbers = 2_000_000
    dropped = int((seeded(ones(numbers), probability) == 0).sum())
    deviation = (numbers * probability * (1 - probability)) ** 0.5
    # Five standard deviations, plus rounding of the probability to a multiple of 2^-16.
    assert abs(dropped - numbers * probability) <= 5 * deviation + numbers * 2**-17


@pytest.mark.parametrize("index", range(4))
def test_numbers_from_one_word_are_independent(index: int) -> None:
    """Four elements share one 64-bit random number but are dropped independently."""
    rows = (seeded(ones(400_000), 0.3) == 0).unflatten(0, (-1, 4))
    assert rows[:, index].float().mean().item() == pytest.approx(0.3, abs=5 * (0.21 / 100_000) ** 0.5)
    for other in range(4):
        both = (rows[:, index] & rows[:, other]).float().mean().item()
        assert both == pytest.approx(0.3 if other == index else 0.09, abs=0.008)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("probability", [0.05, 0.1, 0.5, 0.75])
def test_scale_of_the_remaining_numbers(probability: float, dtype: torch.dtype) -> None:
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = seeded(x, probability)
    kept = found != 0
    expected = x.double() / (1 - probability)
    assert found.dtype == dtype
    # The probability is rounded by at most 2^-17.
    slack = ROUNDING[dtype] + 2**-17 / (1 - probability)
    torch.testing.assert_close(found.double()[kept], expected[kept], atol=1e-7, rtol=slack)
    assert found.double().mean().item() == pytest.approx(x.double().mean().item(), abs=0.1)


@pytest.mark.parametrize("dtype", HALF)
def test_the_gradient_has_the_same_mask_and_scale(dtype: torch.dtype) -> None:
    x = ones(33, 7, dtype=dtype).requires_grad_()
    out = seeded(x, 0.25)
    direction = torch.randn(33, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    (gradient,) = torch.autograd.grad(out, x, direction)
    expected = torch.where(out == 0, 0.0, direction.double() / 0.75)
    assert 0 < int((out == 0).sum()) < out.numel()
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.double(), expected, atol=1e-7, rtol=ROUNDING[dtype])


def test_expanded_gradient() -> None:
    x = ones(5, 9).requires_grad_()
    out = seeded(x, 0.5)
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())


def test_seed_determines_the_mask() -> None:
    x = torch.randn(1000).bfloat16()
    assert torch.equal(seeded(x, 0.4, seed=3), seeded(x, 0.4, seed=3))
    assert not torch.equal(seeded(x, 0.4, seed=3), seeded(x, 0.4, seed=4))
    torch.manual_seed(3)
    first, second = dropout(x, 0.4), dropout(x, 0.4)
    assert not torch.equal(first, second)


def test_input_is_not_modified() -> None:
    x = torch.randn(100).bfloat16()
    before = x.clone()
    seeded(x, 0.4)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_use_torch(dtype: torch.dtype) -> None:
    x = torch.randn(1000, dtype=dtype)
    found = seeded(x, 0.3)
    torch.manual_seed(0)
    assert torch.equal(found, F.dropout(x, 0.3))


@pytest.mark.parametrize("probability", [0.0, 1e-12, 2**-18])
def test_tiny_probability(probability: float) -> None:
    x = torch.randn(1001).bfloat16().requires_grad_()
    out = seeded(x, probability)
    out.sum().backward()
    assert torch.equal(out, x)
    assert torch.equal(x.grad, torch.ones_like(x))


def test_probability_1() -> None:
    assert not seeded(ones(1001), 1.0).any()


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2,), (3,), (5,), (3, 0, 2), (7, 11), (1, 2, 3, 5)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    x = ones(*shape).requires_grad_()
    out = seeded(x, 0.5)
    assert out.shape == shape and set(out.flatten().tolist()) <= {0.0, 2.0}
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())


def test_numbers_of_a_partial_word() -> None:
    """Seven elements need two 64-bit random numbers, the second of which is only partly used."""
    torch.manual_seed(0)
    drops = torch.stack([dropout(ones(7), 0.5) == 0 for _ in range(2000)]).float().mean(0)
    torch.testing.assert_close(drops, torch.full((7,), 0.5), atol=5 * (0.25 / 2000) ** 0.5, rtol=0)


def test_non_contiguous_input() -> None:
    base = torch.arange(1.0, 25.0).reshape(4, 6).bfloat16()
    for view in (base.T, base[:, ::2], base[1:, 3:], base[:1].expand(5, 6)):
        found, expected = seeded(view, 0.5), seeded(view.clone().contiguous(), 0.5)
        assert torch.equal(found, expected)
        assert torch.equal(found[found != 0], (2 * view)[found != 0])


def test_signs_and_zeros() -> None:
    x = torch.tensor([-3.0, -0.0, 0.0, 3.0]).repeat(500).bfloat16()
    found = seeded(x, 0.5)
    assert set(found.tolist()) == {-6.0, 0.0, 6.0}
    assert bool(((found == 0) | (found.sign() == x.sign())).all())


def test_non_finite_numbers() -> None:
    kept = seeded(ones(3000), 0.5) != 0
    x = torch.tensor([torch.nan, torch.inf, -torch.inf]).repeat(1000).bfloat16()
    found = seeded(x, 0.5)
    torch.testing.assert_close(found[kept], x[kept], equal_nan=True)
    assert not found[~kept].any()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_reproduces_the_mask(reentrant: bool) -> None:
    masks = []

    def block(x: torch.Tensor) -> torch.Tensor:
        out = dropout(x, 0.5)
        masks.append(out.detach() != 0)
        return out * out

    x = ones(257).requires_grad_()
    torch.manual_seed(0)
    out = checkpoint(block, x, use_reentrant=reentrant)
    torch.rand(10)  # numbers drawn in between have no effect
    out.sum().backward()
    first, again = masks
    assert torch.equal(first, again)
    # The derivative of (2x)^2 at 1 where x is kept.
    assert torch.equal(x.grad, torch.where(first, 8.0, 0.0).bfloat16())
