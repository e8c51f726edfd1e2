"""The compiled step of bf16 weights: the arithmetic of torch's own AdamW, and fair rounding that resumes."""

import shutil

import pytest
import torch
from torch import nn

from internvl_chat.train.optim.adamw import MasterAdamW, StochasticAdamW
from internvl_chat.train.optim.fused_step import master_step, step_factors, stochastic_step

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler here")

SHAPES = [(64, 48), (7,), (1001,), (1,), (), (0, 4)]
# Gradients of a few units are summed: moments that come out near zero keep the rounding of what cancelled.
LAST_PLACES = 2 * 2**-23
OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.05}


def make_weights(shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter((0.02 * torch.randn(s, generator=generator)).bfloat16()) for s in shapes]


def run(optimizer, weights, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(1000 + step)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator).bfloat16().to(weight.dtype)
        optimizer.step()
    return [weight.detach().clone() for weight in weights]


def test_masters_move_as_by_torch():
    """To a few units in the last place of float32, with gradients that are not contiguous too."""
    weights = make_weights()
    exact = [nn.Parameter(weight.detach().float()) for weight in weights]
    ours, theirs = MasterAdamW(weights, compiled=True, **OPTIONS), torch.optim.AdamW(exact, **OPTIONS)
    run(ours, weights, range(20))
    run(theirs, exact, range(20))
    for weight, other in zip(weights, exact, strict=True):
        state, torchs = ours.state[weight], theirs.state[other]
        assert state["step"] == 20
        torch.testing.assert_close(state["master"], other.detach(), rtol=2e-6, atol=1e-8)
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(state[name], torchs[name], rtol=2e-6, atol=LAST_PLACES)
        assert torch.equal(weight, state["master"].bfloat16())


def test_gradients_may_lie_otherwise_in_memory():
    straight, turned = (make_weights([(64, 48)])[0] for _ in range(2))
    straight.grad = torch.randn(64, 48).bfloat16()
    turned.grad = straight.grad.t().contiguous().t()
    for weight in (straight, turned):
        MasterAdamW([weight], compiled=True, **OPTIONS).step()
    assert torch.equal(straight, turned)


def test_rounding_is_fair():
    """A step of 5e-6 moves a weight of 0.02 by a spacing of 2**-13 with the probability p = 5e-6 / 2**-13."""
    weight = nn.Parameter(torch.full((400_000,), 0.02).bfloat16())
    start = weight[0].item()
    weight.grad = torch.ones_like(weight)
    StochasticAdamW([weight], compiled=True, seed=1, **(OPTIONS | {"lr": 5e-6, "weight_decay": 0.0})).step()
    moved = (start - weight.detach().float()) / 2**-13
    assert set(moved.unique().tolist()) == {0, 1}
    p = 5e-6 / 2**-13
    assert moved.mean().item() == pytest.approx(p, abs=4 * (p / len(weight)) ** 0.5)
    spread = moved.view(400, 1000).mean(dim=1).var().item()
    assert spread == pytest.approx(p * (1 - p) / 1000, rel=0.3)


def test_moments_are_the_same_whatever_the_rounding():
    rounded, exact = make_weights(), make_weights()
    ours = StochasticAdamW(rounded, compiled=True, seed=1, **OPTIONS)
    theirs = StochasticAdamW(exact, seed=1, **OPTIONS)
    run(ours, rounded, range(3))
    run(theirs, exact, range(3))
    for left, right in zip(rounded, exact, strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                ours.state[left][name], theirs.state[right][name], rtol=2e-6, atol=LAST_PLACES
            )


def test_rounding_follows_from_the_seed_and_resumes():
    """And leaves torch's own random numbers alone."""

    def start(seed=1):
        weights = make_weights()
        return weights, StochasticAdamW(weights, compiled=True, seed=seed, **OPTIONS)

    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    weights, optimizer = start()
    undisturbed = run(optimizer, weights, range(4))
    assert torch.equal(torch.rand(4), expected)

    weights, optimizer = start()
    run(optimizer, weights, range(2))
    state = optimizer.state_dict()
    optimizer = StochasticAdamW(weights, compiled=True, seed=1, **OPTIONS)
    optimizer.load_state_dict(state)
    torch.manual_seed(9)
    resumed = run(optimizer, weights, range(2, 4))
    weights, optimizer = start(seed=2)
    other = run(optimizer, weights, range(4))
    assert all(torch.equal(a, b) for a, b in zip(undisturbed, resumed, strict=True))
    assert not torch.equal(undisturbed[0], other[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stays_so(value):
    factors = step_factors(OPTIONS, 1)
    grad, first, second = torch.zeros(64), torch.zeros(64), torch.zeros(64)
    weight = torch.full((64,), value).bfloat16()
    stochastic_step(weight, grad, first, second, factors)
    assert torch.equal(weight.isnan(), torch.full((64,), value).isnan())
    assert value != value or (weight == value).all()


def test_one_compilation_for_all_sizes():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count in (1001, 64, 4096):
            tensors = [torch.zeros(count) for _ in range(4)]
            master_step(torch.zeros(count).bfloat16(), *tensors, step_factors(OPTIONS, 1))
