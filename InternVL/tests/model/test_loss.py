"""The loss: weights by hand, cross-entropy against an explicit log-softmax in float64."""

import pytest
import torch

from internvl_chat.model.loss import LOSS_REDUCTIONS, token_losses, token_weight


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
        ("sample", (2.0 + 6.0) / 2),  # the mean of the records' means
        ("token", (4 * 2.0 + 1 * 6.0) / 5),  # the mean of all tokens
        ("square", (4 * 0.5 * 2.0 + 1 * 6.0) / (4 * 0.5 + 1)),
    ],
)
def test_what_two_records_of_four_tokens_and_one_weigh(reduction: str, expected: float) -> None:
    losses = torch.tensor([2.0, 2.0, 2.0, 2.0, 6.0])
    weights = torch.tensor([token_weight(4, reduction)] * 4 + [token_weight(1, reduction)])
    assert ((losses * weights).sum() / weights.sum()).item() == pytest.approx(expected)


def test_the_reductions_are_known_by_name() -> None:
    assert set(LOSS_REDUCTIONS) == {"sample", "token", "square"}
    with pytest.raises(KeyError):
        token_weight(4, "mean")


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_cross_entropy_of_each_token(scale: float) -> None:
    rng = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(7, 11, generator=rng)
    targets = torch.randint(0, 11, (7,), generator=rng)
    exact = logits.double()
    exact = exact - exact.exp().sum(dim=-1, keepdim=True).log()
    expected = torch.tensor([-exact[i, t] for i, t in enumerate(targets)])
    torch.testing.assert_close(token_losses(logits, targets), expected.float(), atol=1e-5, rtol=1e-6)


def test_low_precision_logits_are_judged_in_float32() -> None:
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(1)).bfloat16()
    targets = torch.tensor([0, 3, 8, 2, 2])
    losses = token_losses(logits, targets)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, token_losses(logits.float(), targets))


def test_no_token_no_loss() -> None:
    losses = token_losses(torch.zeros(0, 9), torch.zeros(0, dtype=torch.long))
    assert losses.shape == (0,)
