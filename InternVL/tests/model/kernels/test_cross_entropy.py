"""Cross-entropy against torch's and against an explicit log-softmax in float64."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_within_rounding
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl_chat.model.kernels import cross_entropy
from internvl_chat.model.kernels.cross_entropy import cross_entropy_in_place

CHUNKS = [1, 40, 4 * 11, 4 * 11 * 3, 4 * 11 * 7, 1 << 23]  # bytes; 11 columns: 1, 1, 1, 3, 7 and all rows


def sample(
    rows: int, columns: int, *, seed: int = 0, scale: float = 3.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float64 logits and targets."""
    rng = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, columns, generator=rng, dtype=torch.float64)
    return logits, torch.randint(0, columns, (rows,), generator=rng)


def expected_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, targets, reduction="none")


def expected_gradient(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return autograd's gradient of the summed losses."""
    leaf = logits.detach().clone().requires_grad_(True)
    return torch.autograd.grad(expected_losses(leaf, targets).sum(), leaf)[0]


def losses_and_gradient(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses and the gradient of their sum."""
    work = logits.clone()
    return cross_entropy_in_place(work, targets, gradient=True), work


def assert_losses(found: torch.Tensor, expected: torch.Tensor, logits: torch.Tensor) -> None:
    """Compare losses up to rounding: of the logits, the maximum subtraction, the sum and the logarithm."""
    magnitude = 2 * float(logits.abs().max()) if logits.numel() else 0.0
    assert_within_rounding(found, expected, logits.shape[1] + 3, magnitude=magnitude)


def assert_gradients(found: torch.Tensor, expected: torch.Tensor, logits: torch.Tensor) -> None:
    """Compare gradients up to rounding: the error of a logit is the relative error of its probability."""
    magnitude = 1 + 2 * float(logits.abs().max()) if logits.numel() else 0.0
    assert_within_rounding(found, expected, logits.shape[1] + 3, magnitude=magnitude)


@pytest.fixture
def chunk_bytes(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Set the chunk size in bytes."""
    return lambda size: monkeypatch.setattr(cross_entropy, "_CHUNK_BYTES", {"cpu": size})


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_cross_entropy_of_each_token_by_a_log_softmax(scale: float) -> None:
    logits, targets = sample(7, 11, scale=scale)
    exact = logits - logits.exp().sum(dim=-1, keepdim=True).log()
    expected = torch.stack([-exact[i, t] for i, t in enumerate(targets)])
    assert_losses(cross_entropy_in_place(logits.float(), targets, gradient=False), expected, logits)


def test_loss_and_gradient_by_hand() -> None:
    """Losses are log 2 for two equally likely tokens, and log 4 if the other one is three times as likely."""
    logits = torch.tensor([[0.0, 0.0], [0.0, float(torch.tensor(3.0).log())]])
    losses, gradient = losses_and_gradient(logits, torch.tensor([0, 0]))
    assert losses.tolist() == pytest.approx([0.6931472, 1.3862944])
    assert gradient.flatten().tolist() == pytest.approx([-0.5, 0.5, -0.75, 0.75])


@pytest.mark.parametrize("size", CHUNKS)
def test_values_and_gradients_for_any_chunk_size(chunk_bytes: Callable[[int], None], size: int) -> None:
    logits, targets = sample(7, 11)
    chunk_bytes(size)
    found, gradient = losses_and_gradient(logits.float(), targets)
    assert_losses(found, expected_losses(logits, targets), logits)
    assert_gradients(gradient, expected_gradient(logits, targets), logits)


@settings(max_examples=100)
@given(
    rows=st.integers(0, 9), columns=st.integers(1, 12), per_chunk=st.integers(1, 10), seed=st.integers(0, 999)
)
def test_any_shape_and_chunk_size(rows: int, columns: int, per_chunk: int, seed: int) -> None:
    logits, targets = sample(rows, columns, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "_CHUNK_BYTES", {"cpu": 4 * columns * per_chunk})
        found, gradient = losses_and_gradient(logits.float(), targets)
    assert_losses(found, expected_losses(logits, targets), logits)
    assert_gradients(gradient, expected_gradient(logits, targets), logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_are_computed_in_float32(dtype: torch.dtype) -> None:
    logits, targets = sample(6, 9)
    logits = logits.to(dtype)
    losses, gradient = losses_and_gradient(logits, targets)
    expected, of_expected = losses_and_gradient(logits.float(), targets)
    assert losses.dtype == torch.float32 and torch.equal(losses, expected)
    assert gradient.dtype == dtype and torch.equal(gradient, of_expected.to(dtype))
    assert_losses(losses, expected_losses(logits.float(), targets), logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_without_gradient_logits_do_not_change(dtype: torch.dtype) -> None:
    """For float32 logits, the conversion to float32 does not copy them."""
    logits, targets = sample(5, 7)
    logits = logits.to(dtype)
    before = logits.clone()
    cross_entropy_in_place(logits, targets, gradient=False)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("targets", [[3, 3, 3, 3], [0, 3, 0, 3], [8, 0, 8, 8]])
def test_repeated_targets(chunk_bytes: Callable[[int], None], targets: list[int]) -> None:
    chunk_bytes(4 * 9 * 3)
    logits, wanted = sample(4, 9)[0].float(), torch.tensor(targets)
    losses, gradient = losses_and_gradient(logits, wanted)
    assert_losses(losses, expected_losses(logits, wanted), logits)
    assert_gradients(gradient, expected_gradient(logits, wanted), logits)


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
    found, of_found = losses_and_gradient(logits, targets)
    assert found.item() == pytest.approx(loss, abs=1e-6)
    assert of_found[0].tolist() == pytest.approx(gradient, abs=1e-6)


@pytest.mark.parametrize("row", [[torch.nan, 0.0], [torch.inf, 0.0], [-torch.inf, -torch.inf]])
def test_invalid_logits_give_nan(row: list[float]) -> None:
    """As in torch, other rows are not affected."""
    logits, targets = torch.tensor([row, [0.0, 0.0]]), torch.tensor([0, 0])
    losses, gradient = losses_and_gradient(logits, targets)
    assert losses[0].isnan() and expected_losses(logits, targets)[0].isnan()
    assert losses[1].item() == pytest.approx(0.6931472)
    assert gradient[1].tolist() == pytest.approx([-0.5, 0.5])


def test_losses_are_never_negative() -> None:
    """Rounding must not make the loss of an almost certain token negative."""
    logits = torch.cat([torch.zeros(200, 5), torch.linspace(5, 40, 200)[:, None]], dim=1)
    assert (cross_entropy_in_place(logits, torch.full((200,), 5), gradient=False) >= 0).all()


@pytest.mark.parametrize("target", [-100, 9])
def test_targets_outside_the_vocabulary_raise(target: int) -> None:
    """Invalid targets are never silently ignored."""
    with pytest.raises((IndexError, RuntimeError)):
        cross_entropy_in_place(torch.zeros(2, 9), torch.tensor([0, target]), gradient=False)
