"""The rounding bound holds for any summation order, and is tight enough to detect wrong sums."""

import pytest
import torch
from helpers import assert_within_rounding, rounding_bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("terms", [1, 2, 30, 1000])
def test_sums_in_any_order(dtype: torch.dtype, terms: int) -> None:
    rng = torch.Generator().manual_seed(0)
    numbers = torch.randn(terms, generator=rng).to(dtype)
    orders = torch.stack([torch.randperm(terms, generator=rng) for _ in range(200)])
    partial = torch.zeros(200, dtype=dtype)
    largest = 0.0
    for term in numbers[orders].T:
        partial = partial + term
        largest = max(largest, float(partial.abs().max()))
    differences = (partial[:, None].double() - partial).abs()
    bound = rounding_bound(terms, dtype, largest)
    assert differences.max() <= bound
    if terms > 2:
        assert differences.max() > bound / 20


def test_larger_differences_are_reported() -> None:
    numbers = torch.randn(588, generator=torch.Generator().manual_seed(0))
    assert_within_rounding(numbers.sum(), numbers.double().sum(), 588, magnitude=30.0)
    with pytest.raises(AssertionError, match="one term too few"):
        found = numbers[numbers.abs() > numbers.abs().min()].sum()
        assert_within_rounding(found, numbers.double().sum(), 588, magnitude=30.0, name="one term too few")


def test_another_dtype_is_no_reason_for_another_bound() -> None:
    with pytest.raises(AssertionError):
        assert_within_rounding(torch.ones(2).bfloat16(), torch.ones(2), 100)
