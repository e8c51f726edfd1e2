"""The loss: weights by hand, cross-entropy against torch's and an explicit log-softmax in float64."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_within_rounding
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl_chat.model import loss as loss_module
from internvl_chat.model.loss import LOSS_REDUCTIONS, losses_in_place, token_weight

CHUNKS = [1, 40, 4 * 11, 4 * 11 * 3, 4 * 11 * 7, 1 << 23]  # bytes; 11 columns: 1, 1, 1, 3, 7 and all rows


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


# Cross-entropy


def draw(rows: int, columns: int, *, seed: int = 0, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits in float64 and targets."""
    rng = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, columns, generator=rng, dtype=torch.float64)
    return logits, torch.randint(0, columns, (rows,), generator=rng)


def torch_s(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, targets, reduction="none")


def torch_s_gradient(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The gradient of the losses' sum, by autograd."""
    leaf = logits.detach().clone().requires_grad_(True)
    return torch.autograd.grad(torch_s(leaf, targets).sum(), leaf)[0]


def with_gradient(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses, and the gradient of their sum."""
    work = logits.clone()
    return losses_in_place(work, targets, gradient=True), work


def assert_losses(found: torch.Tensor, expected: torch.Tensor, logits: torch.Tensor) -> None:
    """A sum over the columns, after the logits are rounded and the largest subtracted, and a logarithm."""
    magnitude = 2 * float(logits.abs().max()) if logits.numel() else 0.0
    assert_within_rounding(found, expected, logits.shape[1] + 3, magnitude=magnitude)


def assert_gradients(found: torch.Tensor, expected: torch.Tensor, logits: torch.Tensor) -> None:
    """The error of a logit is the relative error of its probability, which is at most 1."""
    magnitude = 1 + 2 * float(logits.abs().max()) if logits.numel() else 0.0
    assert_within_rounding(found, expected, logits.shape[1] + 3, magnitude=magnitude)


@pytest.fixture
def chunk_bytes(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many bytes of float32 logits are in work at a time."""
    return lambda size: monkeypatch.setattr(loss_module, "_CHUNK_BYTES", {"cpu": size})


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_cross_entropy_of_each_token_by_a_log_softmax(scale: float) -> None:
    logits, targets = draw(7, 11, scale=scale)
    exact = logits - logits.exp().sum(dim=-1, keepdim=True).log()
    expected = torch.stack([-exact[i, t] for i, t in enumerate(targets)])
    assert_losses(losses_in_place(logits.float(), targets, gradient=False), expected, logits)


def test_loss_and_gradient_by_hand() -> None:
    """Two equally likely tokens, then one three times as likely: log 2 and log 4."""
    logits = torch.tensor([[0.0, 0.0], [0.0, float(torch.tensor(3.0).log())]])
    losses, gradient = with_gradient(logits, torch.tensor([0, 0]))
    assert losses.tolist() == pytest.approx([0.6931472, 1.3862944])
    assert gradient.flatten().tolist() == pytest.approx([-0.5, 0.5, -0.75, 0.75])


@pytest.mark.parametrize("size", CHUNKS)
def test_values_and_gradients_of_torch_whatever_the_chunks(
    chunk_bytes: Callable[[int], None], size: int
) -> None:
    logits, targets = draw(7, 11)
    chunk_bytes(size)
    found, gradient = with_gradient(logits.float(), targets)
    assert_losses(found, torch_s(logits, targets), logits)
    assert_gradients(gradient, torch_s_gradient(logits, targets), logits)


@settings(max_examples=100)
@given(
    rows=st.integers(0, 9), columns=st.integers(1, 12), per_chunk=st.integers(1, 10), seed=st.integers(0, 999)
)
def test_any_shape_and_any_cut(rows: int, columns: int, per_chunk: int, seed: int) -> None:
    logits, targets = draw(rows, columns, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "_CHUNK_BYTES", {"cpu": 4 * columns * per_chunk})
        found, gradient = with_gradient(logits.float(), targets)
    assert_losses(found, torch_s(logits, targets), logits)
    assert_gradients(gradient, torch_s_gradient(logits, targets), logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_judged_in_float32(dtype: torch.dtype) -> None:
    logits, targets = draw(6, 9)
    logits = logits.to(dtype)
    losses, gradient = with_gradient(logits, targets)
    expected, of_expected = with_gradient(logits.float(), targets)
    assert losses.dtype == torch.float32 and torch.equal(losses, expected)
    assert gradient.dtype == dtype and torch.equal(gradient, of_expected.to(dtype))
    assert_losses(losses, torch_s(logits.float(), targets), logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_without_a_gradient_the_logits_stay(dtype: torch.dtype) -> None:
    """In float32 a conversion is no copy."""
    logits, targets = draw(5, 7)
    logits = logits.to(dtype)
    before = logits.clone()
    losses_in_place(logits, targets, gradient=False)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("targets", [[3, 3, 3, 3], [0, 3, 0, 3], [8, 0, 8, 8]])
def test_targets_that_repeat(chunk_bytes: Callable[[int], None], targets: list[int]) -> None:
    chunk_bytes(4 * 9 * 3)
    logits, wanted = draw(4, 9)[0].float(), torch.tensor(targets)
    losses, gradient = with_gradient(logits, wanted)
    assert_losses(losses, torch_s(logits, wanted), logits)
    assert_gradients(gradient, torch_s_gradient(logits, wanted), logits)


@pytest.mark.parametrize(
    ("row", "target", "loss", "gradient"),
    [
        ([1e4, 0.0, 0.0], 0, 0.0, [0, 0, 0]),
        ([1e4, 0.0, 0.0], 1, 1e4, [1, -1, 0]),
        ([-1e4, -1e4, -1e4], 2, 1.0986123, [1 / 3, 1 / 3, -2 / 3]),
        ([1e4, 1e4, -1e4], 0, 0.6931472, [-0.5, 0.5, 0]),
        ([3e38, 0.0, 0.0], 0, 0.0, [0, 0, 0]),
        ([0.0, -torch.inf, 0.0], 0, 0.6931472, [-0.5, 0, 0.5]),
        ([0.0, -torch.inf, -torch.inf], 0, 0.0, [0, 0, 0]),
        ([0.0, -torch.inf, 0.0], 1, torch.inf, [0.5, -1, 0.5]),
    ],
)
def test_extreme_logits(row: list[float], target: int, loss: float, gradient: list[float]) -> None:
    logits, targets = torch.tensor([row]), torch.tensor([target])
    found, of_found = with_gradient(logits, targets)
    assert found.item() == pytest.approx(loss, abs=1e-6)
    assert of_found[0].tolist() == pytest.approx(gradient, abs=1e-6)


@pytest.mark.parametrize("row", [[torch.nan, 0.0], [torch.inf, 0.0], [-torch.inf, -torch.inf]])
def test_what_has_no_loss_is_not_a_number_as_with_torch(row: list[float]) -> None:
    """The trainer stops at such a loss; a neighbouring row is not touched by it."""
    logits, targets = torch.tensor([row, [0.0, 0.0]]), torch.tensor([0, 0])
    losses, gradient = with_gradient(logits, targets)
    assert losses[0].isnan() and torch_s(logits, targets)[0].isnan()
    assert losses[1].item() == pytest.approx(0.6931472)
    assert gradient[1].tolist() == pytest.approx([-0.5, 0.5])


def test_losses_are_never_negative() -> None:
    """Where one token is all but certain, rounding must not make its loss less than none."""
    logits = torch.cat([torch.zeros(200, 5), torch.linspace(5, 40, 200)[:, None]], dim=1)
    assert (losses_in_place(logits, torch.full((200,), 5), gradient=False) >= 0).all()


@pytest.mark.parametrize("target", [-100, 9])
def test_a_target_outside_the_vocabulary_is_an_error(target: int) -> None:
    """Only supervised tokens get here; nothing is ignored in silence."""
    with pytest.raises((IndexError, RuntimeError)):
        losses_in_place(torch.zeros(2, 9), torch.tensor([0, target]), gradient=False)
