"""The loss: weights by hand, cross-entropy against torch's and an explicit log-softmax in float64."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl_chat.model import loss as loss_module
from internvl_chat.model.loss import LOSS_REDUCTIONS, token_losses, token_weight

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


def with_gradient(
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    logits: torch.Tensor,
    targets: torch.Tensor,
    upstream: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of a function, and the gradient of its logits."""
    leaf = logits.detach().clone().requires_grad_(True)
    losses = function(leaf, targets)
    (gradient,) = torch.autograd.grad(losses, leaf, upstream.to(losses.dtype))
    return losses.detach(), gradient


@pytest.fixture
def chunk_bytes(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many bytes of float32 logits are in work at a time."""
    return lambda size: monkeypatch.setattr(loss_module, "_CHUNK_BYTES", {"cpu": size})


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_cross_entropy_of_each_token_by_a_log_softmax(scale: float) -> None:
    logits, targets = draw(7, 11, scale=scale)
    exact = logits - logits.exp().sum(dim=-1, keepdim=True).log()
    expected = torch.tensor([-exact[i, t] for i, t in enumerate(targets)])
    found = token_losses(logits.float(), targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=1e-6)


def test_loss_and_gradient_by_hand() -> None:
    """Three tokens of which two are equally likely: log 2, and half of the upstream gradient each way."""
    logits = torch.tensor([[0.0, 0.0], [0.0, float(torch.tensor(3.0).log())]], requires_grad=True)
    losses = token_losses(logits, torch.tensor([0, 0]))
    assert losses.tolist() == pytest.approx([0.6931472, 1.3862944])  # log 2, log 4
    losses.backward(torch.tensor([1.0, 4.0]))
    assert logits.grad.flatten().tolist() == pytest.approx([-0.5, 0.5, -3.0, 3.0])


@pytest.mark.parametrize("size", CHUNKS)
def test_values_and_gradients_of_torch_whatever_the_chunks(
    chunk_bytes: Callable[[int], None], size: int
) -> None:
    logits, targets = draw(7, 11)
    upstream = torch.linspace(-1, 2, 7, dtype=torch.float64)
    losses, gradient = with_gradient(torch_s, logits, targets, upstream)
    chunk_bytes(size)
    found, of_found = with_gradient(token_losses, logits.float(), targets, upstream)
    torch.testing.assert_close(found.double(), losses, atol=2e-6, rtol=0)
    torch.testing.assert_close(of_found.double(), gradient, atol=1e-6, rtol=0)
    assert of_found.dtype == torch.float32


@settings(deadline=None, max_examples=100)
@given(
    rows=st.integers(0, 9), columns=st.integers(1, 12), per_chunk=st.integers(1, 10), seed=st.integers(0, 999)
)
def test_any_shape_and_any_cut(rows: int, columns: int, per_chunk: int, seed: int) -> None:
    logits, targets = draw(rows, columns, seed=seed)
    upstream = torch.randn(rows, generator=torch.Generator().manual_seed(seed))
    losses, gradient = with_gradient(torch_s, logits, targets, upstream)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "_CHUNK_BYTES", {"cpu": 4 * columns * per_chunk})
        found, of_found = with_gradient(token_losses, logits.float(), targets, upstream)
    torch.testing.assert_close(found.double(), losses, atol=5e-6, rtol=0)
    torch.testing.assert_close(of_found.double(), gradient, atol=5e-6, rtol=0)


def test_gradients_by_finite_differences() -> None:
    """The function computes in float32, so the steps are wide and the tolerance is that of float32."""
    logits, targets = draw(4, 5)
    logits.requires_grad_(True)
    assert torch.autograd.gradcheck(
        lambda x: token_losses(x, targets), (logits,), eps=1e-2, atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_judged_in_float32(dtype: torch.dtype) -> None:
    logits, targets = draw(6, 9)
    logits, upstream = logits.to(dtype), torch.linspace(0.5, 1.5, 6)
    losses, gradient = with_gradient(token_losses, logits, targets, upstream)
    expected, of_expected = with_gradient(token_losses, logits.float(), targets, upstream)
    assert losses.dtype == torch.float32 and torch.equal(losses, expected)
    assert gradient.dtype == dtype and torch.equal(gradient, of_expected.to(dtype))
    reference, of_reference = with_gradient(torch_s, logits.float(), targets, upstream)
    torch.testing.assert_close(losses, reference, atol=2e-6, rtol=0)
    torch.testing.assert_close(gradient, of_reference.to(dtype), atol=1e-6, rtol=torch.finfo(dtype).eps)


def test_no_float32_copy_of_all_logits_is_kept() -> None:
    """For the backward pass there are the logits in their own dtype, and one number a row."""
    kept = []
    logits, targets = draw(64, 50)
    logits = logits.bfloat16().requires_grad_(True)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        token_losses(logits, targets)
    assert [(tuple(t.shape), t.dtype) for t in kept if t.is_floating_point()] == [
        ((64, 50), torch.bfloat16),
        ((64,), torch.float32),
    ]
    assert any(t.data_ptr() == logits.data_ptr() for t in kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_backward_pass_leaves_the_logits_alone(dtype: torch.dtype) -> None:
    """In float32 a conversion is no copy; a second pass must find what the first one found."""
    logits, targets = draw(5, 7)
    logits = logits.to(dtype).requires_grad_(True)
    before, losses = logits.detach().clone(), token_losses(logits, targets)
    first, second = (torch.autograd.grad(losses.sum(), logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(logits.detach(), before)
    assert torch.equal(first, second)


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    logits, targets = draw(3, 4)
    logits.requires_grad_(True)
    (gradient,) = torch.autograd.grad(token_losses(logits, targets).sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.square().sum().backward()
    upstream = torch.ones(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(token_losses(logits, targets), logits, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t().contiguous().t(),
        lambda x: torch.stack([x, x], dim=-1)[..., 0],
        lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
        lambda x: x[:1].expand(7, -1),
    ],
    ids=["transposed", "every second", "a slice", "expanded"],
)
def test_logits_of_any_strides(view: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> None:
    logits, targets = draw(7, 11)
    logits = logits.to(dtype)
    upstream = torch.linspace(-1, 2, 7)
    assert not view(logits).is_contiguous()
    found = with_gradient(lambda x, t: token_losses(view(x), t), logits, targets, upstream)
    expected = with_gradient(lambda x, t: token_losses(view(x).contiguous(), t), logits, targets, upstream)
    # Sums along another axis go another way round.
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6 if dtype == torch.float32 else 8e-3)


@pytest.mark.parametrize("targets", [[3, 3, 3, 3], [0, 3, 0, 3], [8, 0, 8, 8]])
def test_targets_that_repeat(chunk_bytes: Callable[[int], None], targets: list[int]) -> None:
    chunk_bytes(4 * 9 * 3)
    logits, upstream = draw(4, 9)[0].float(), torch.tensor([1.0, 0.0, -2.0, 0.5])
    found = with_gradient(token_losses, logits, torch.tensor(targets), upstream)
    expected = with_gradient(torch_s, logits, torch.tensor(targets), upstream)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    assert not found[1][1].any()


# Half a unit of the last place of a logit of 1e4 in float32, by which alone the normalizer is off.
ROUNDING = 1e4 * 2.0**-24


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
    logits, targets, upstream = torch.tensor([row]), torch.tensor([target]), torch.ones(1)
    found, of_found = with_gradient(token_losses, logits, targets, upstream)
    assert found.item() == pytest.approx(loss, abs=2 * ROUNDING)
    assert of_found[0].tolist() == pytest.approx(gradient, abs=2 * ROUNDING)
    torch.testing.assert_close(found, torch_s(logits, targets), atol=2 * ROUNDING, rtol=0)


@pytest.mark.parametrize("row", [[torch.nan, 0.0], [torch.inf, 0.0], [-torch.inf, -torch.inf]])
def test_what_has_no_loss_is_not_a_number_as_with_torch(row: list[float]) -> None:
    """The trainer stops at such a loss; a neighbouring row is not touched by it."""
    logits, targets = torch.tensor([row, [0.0, 0.0]]), torch.tensor([0, 0])
    losses, gradient = with_gradient(token_losses, logits, targets, torch.ones(2))
    assert losses[0].isnan() and torch_s(logits, targets)[0].isnan()
    assert losses[1].item() == pytest.approx(0.6931472)
    assert gradient[1].tolist() == pytest.approx([-0.5, 0.5])


def test_losses_are_never_negative() -> None:
    """Where one token is all but certain, rounding must not make its loss less than none."""
    logits = torch.cat([torch.zeros(200, 5), torch.linspace(5, 40, 200)[:, None]], dim=1)
    assert (token_losses(logits, torch.full((200,), 5)) >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_token_no_loss(dtype: torch.dtype) -> None:
    logits = torch.zeros(0, 9, dtype=dtype, requires_grad=True)
    losses = token_losses(logits, torch.zeros(0, dtype=torch.long))
    assert losses.shape == (0,) and losses.dtype == torch.float32
    losses.sum().backward()
    assert logits.grad.shape == (0, 9)


@pytest.mark.parametrize("target", [-100, 9])
def test_a_target_outside_the_vocabulary_is_an_error(target: int) -> None:
    """Only supervised tokens get here; nothing is ignored in silence."""
    with pytest.raises((IndexError, RuntimeError)):
        token_losses(torch.zeros(2, 9), torch.tensor([0, target]))
