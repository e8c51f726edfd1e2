"""Losses and gradients of the head match a linear layer with torch's cross-entropy in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_within_rounding
from torch import nn

from internvl_chat.model.kernels import supervised_head as head_module
from internvl_chat.model.kernels.supervised_head import HeadBuffers, SupervisedHead

WIDTH, VOCABULARY = 6, 11
# A logit is a sum over the hidden size and a loss one over the vocabulary; gradients repeat both sums.
FORWARD = WIDTH + VOCABULARY


def make_head(*, dtype: torch.dtype = torch.float32, trained: bool = True) -> SupervisedHead:
    torch.manual_seed(0)
    return SupervisedHead(WIDTH, VOCABULARY, bias=False, dtype=dtype).requires_grad_(trained)


def draw(count: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return random hidden states, targets and token weights."""
    rng = torch.Generator().manual_seed(seed)
    hidden = 3 * torch.randn(count, WIDTH, generator=rng)
    return hidden, torch.randint(0, VOCABULARY, (count,), generator=rng), torch.rand(count, generator=rng)


def exact(
    head: nn.Linear, hidden: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return losses and the gradients of the hidden states and the weight, from autograd in float64."""
    leaf, matrix = (x.detach().double().requires_grad_(True) for x in (hidden, head.weight))
    losses = F.cross_entropy(leaf @ matrix.t(), targets, reduction="none")
    return losses.detach(), *torch.autograd.grad(losses, (leaf, matrix), weights.double())


@pytest.mark.parametrize("rows", [1, 3, 256])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_losses_and_gradients(monkeypatch: pytest.MonkeyPatch, rows: int, trained: bool, count: int) -> None:
    monkeypatch.setattr(head_module, "_ROWS", rows)
    head, (hidden, targets, weights) = make_head(trained=trained), draw(count)
    losses, of_hidden, of_weight = exact(head, hidden, targets, weights)
    leaf = hidden.clone().requires_grad_(True)
    found = head(leaf, targets)
    found.backward(weights)
    largest = float((hidden @ head.weight.t()).abs().max()) if count else 0.0
    assert_within_rounding(found, losses, FORWARD, magnitude=2 * largest)
    # The error of a logit is the relative error of its probability.
    for gradient, wanted in [(leaf.grad, of_hidden), (head.weight.grad, of_weight)][: 1 + trained]:
        magnitude = (1 + largest) * float(wanted.abs().max()) if count else 0.0
        assert_within_rounding(gradient, wanted, 2 * FORWARD + count, magnitude=magnitude)
    if not trained:
        assert head.weight.grad is None


@pytest.mark.parametrize("trained", [True, False])
def test_bfloat16_is_as_accurate_as_a_linear_layer(trained: bool) -> None:
    """Errors relative to float64 are within bf16 precision (2^-8) and no larger than torch's."""
    head, (hidden, targets, weights) = make_head(dtype=torch.bfloat16, trained=trained), draw(200)
    hidden = hidden.bfloat16()
    _, of_hidden, of_weight = exact(head, hidden, targets, weights)

    def errors(losses_of) -> list[float]:
        leaf, head.weight.grad = hidden.clone().requires_grad_(True), None
        losses_of(leaf).backward(weights)
        pairs = [(leaf.grad, of_hidden), (head.weight.grad, of_weight)][: 1 + trained]
        return [float((found.double() - wanted).norm() / wanted.norm()) for found, wanted in pairs]

    ours = errors(lambda x: head(x, targets))
    torch_s = errors(lambda x: F.cross_entropy(head(x).float(), targets, reduction="none"))
    assert all(error < 1.5 * other < 0.02 for error, other in zip(ours, torch_s, strict=True))


def test_without_targets_it_is_a_linear_layer() -> None:
    head, hidden = make_head(), draw(4)[0].view(2, 2, 6)
    assert torch.equal(head(hidden), F.linear(hidden, head.weight))


@pytest.mark.parametrize("trained", [True, False])
def test_a_second_backward_pass_raises(trained: bool) -> None:
    head, (hidden, targets, weights) = make_head(trained=trained), draw(3)
    losses = head(hidden.requires_grad_(True), targets)
    losses.backward(weights, retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        losses.backward(weights)


def test_a_second_derivative_raises() -> None:
    head, (hidden, targets, _) = make_head(), draw(3)
    hidden.requires_grad_(True)
    upstream = torch.ones(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(head(hidden, targets), hidden, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_without_gradients_logits_are_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "_ROWS", 2)
    sizes = []

    class Memory(HeadBuffers):
        def take_logits(self, rows, hidden, weight):
            sizes.append(rows)
            return super().take_logits(rows, hidden, weight)

    head, (hidden, targets, _) = make_head(), draw(7)
    head.head_buffers = Memory()
    expected = F.cross_entropy(hidden @ head.weight.t(), targets, reduction="none")
    with torch.no_grad():
        assert_within_rounding(head(hidden, targets), expected, FORWARD)
    assert sizes == [2]


def test_a_copy_is_independent() -> None:
    head, (hidden, targets, _) = make_head(), draw(3)
    other = copy.deepcopy(head)
    other.weight.data.zero_()
    assert other(hidden, targets).tolist() == pytest.approx([float(torch.tensor(11.0).log())] * 3)
    assert head(hidden, targets).tolist() != other(hidden, targets).tolist()
