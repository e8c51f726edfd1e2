"""Weights of the training loss match manual computations."""

import pytest
import torch

from internvl_chat.constants import LOSS_REDUCTIONS
from internvl_chat.model.loss import token_weight


@pytest.mark.parametrize(
    ("supervised", "reduction", "weight"),
    [
        (1, "sample", 1.0),
        (4, "sample", 0.25),
        (5, "sample", 0.2),
        (1, "square", 1.0),
        (4, "square", 0.5),
        (25, "square", 0.2),
        (1, "token", 1.0),
        (25, "token", 1.0),
    ],
)
def test_weight_of_a_token(supervised: int, reduction: str, weight: float) -> None:
    assert token_weight(supervised, reduction) == pytest.approx(weight, rel=1e-15)


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        ("sample", (2.0 + 6.0) / 2),  # mean of the records' means
        ("token", (4 * 2.0 + 1 * 6.0) / 5),  # mean over all tokens
        ("square", (4 * 0.5 * 2.0 + 1 * 6.0) / (4 * 0.5 + 1)),
    ],
)
def test_two_records_with_four_tokens_and_one(reduction: str, expected: float) -> None:
    losses = torch.tensor([2.0, 2.0, 2.0, 2.0, 6.0])
    weights = torch.tensor([token_weight(4, reduction)] * 4 + [token_weight(1, reduction)])
    assert ((losses * weights).sum() / weights.sum()).item() == pytest.approx(expected)


def test_unknown_reduction() -> None:
    assert set(LOSS_REDUCTIONS) == {"sample", "token", "square"}
    with pytest.raises(KeyError):
        token_weight(4, "mean")
