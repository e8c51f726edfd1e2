"""The compiled step of bf16 weights matches torch's AdamW; its rounding is unbiased and reproducible."""

import shutil

import pytest
import torch
from torch import nn

from internvl_chat.train.optim.adamw import build_adamw
from internvl_chat.train.optim.fused_step import fused_step, step_factors

pytestmark = pytest.mark.skipif(
    shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on a CPU"
)

SHAPES = [(64, 48), (7,), (1001,), (1,), (), (0, 4)]
OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.05}
STEPS = 20
# Relative rounding error of a float32 operation.
EPS = 2.0**-24


def build(weights, precision, *, compiled=True, seed=1, **options):
    groups = [{"params": weights}]
    return build_adamw(groups, precision=precision, compiled=compiled, seed=seed, **(OPTIONS | options))


def make_weights(shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter((0.02 * torch.randn(s, generator=generator)).bfloat16()) for s in shapes]


def run(optimizer, weights, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(1000 + step)
        for weight in weights:
            # Positive, so that the moments are sums without cancellation.
            weight.grad = torch.rand(weight.shape, generator=generator).bfloat16().to(weight.dtype)
        optimizer.step()
    return [weight.detach().clone() for weight in weights]


def assert_close(ours, theirs, *, is_weight):
    """Compare two float32 computations that differ in the order and fusion of operations.

    In either computation, a moment is rounded at most 4 times per step (difference, factor, product, sum). A
    weight of at most 0.12 is rounded twice per step. Its update, of at most the learning rate, is rounded 16
    times and inherits the errors of both moments.
    """
    moment = 2 * 4 * STEPS * EPS
    if is_weight:
        absolute = 2 * STEPS * (2 * 0.12 * EPS + OPTIONS["lr"] * (16 * EPS + 2 * moment))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=absolute)
    else:
        torch.testing.assert_close(ours, theirs, rtol=moment, atol=0)


@pytest.mark.parametrize("stance", ["default", "force_eager"])
def test_masters_match_torch_adamw(stance):
    weights = make_weights()
    exact = [nn.Parameter(weight.detach().float()) for weight in weights]
    ours, theirs = build(weights, "master"), torch.optim.AdamW(exact, **OPTIONS)
    with torch.compiler.set_stance(stance):
        run(ours, weights, range(STEPS))
    run(theirs, exact, range(STEPS))
    for weight, other in zip(weights, exact, strict=True):
        state = ours.state[weight]
        assert state["step"] == STEPS
        assert_close(state["master"], other.detach(), is_weight=True)
        for name in ("exp_avg", "exp_avg_sq"):
            assert_close(state[name], theirs.state[other][name], is_weight=False)
        assert torch.equal(weight, state["master"].bfloat16())


@pytest.mark.parametrize("precision", ["master", "stochastic"])
def test_compiled_and_eager_steps_agree(precision):
    """Moments and masters match within float32 rounding."""
    one_pass, sliced = make_weights(), make_weights()
    ours, theirs = build(one_pass, precision), build(sliced, precision, compiled=False)
    run(ours, one_pass, range(STEPS))
    run(theirs, sliced, range(STEPS))
    for left, right in zip(one_pass, sliced, strict=True):
        assert ours.state[left].keys() == theirs.state[right].keys()
        for name, value in ours.state[left].items():
            assert_close(value, theirs.state[right][name], is_weight=name == "master")


def test_stochastic_step_rounds_to_adjacent_bf16_numbers():
    """Each new weight is one of the two bf16 neighbors of the exact float32 result."""
    (weight,) = make_weights([(4096,)])
    exact = nn.Parameter(weight.detach().float())
    run(torch.optim.AdamW([exact], **OPTIONS), [exact], range(1))
    run(build([weight], "stochastic"), [weight], range(1))
    below = (exact.detach().view(torch.int32) & -(2**16)).view(torch.float32)
    above = ((exact.detach().view(torch.int32) & -(2**16)) + 2**16).view(torch.float32)
    rounded = weight.detach().float()
    assert ((rounded == below) | (rounded == above)).all()
    assert (rounded == below).any() and (rounded == above).any()


def test_gradients_need_not_be_contiguous():
    straight, transposed = (make_weights([(64, 48)])[0] for _ in range(2))
    straight.grad = torch.randn(64, 48).bfloat16()
    transposed.grad = straight.grad.t().contiguous().t()
    for weight in (straight, transposed):
        build([weight], "master").step()
    assert torch.equal(straight, transposed)


def test_rounding_is_unbiased():
    """A step of 5e-6 moves a weight of 0.02 by a spacing of 2**-13 with probability p = 5e-6 / 2**-13."""
    weight = nn.Parameter(torch.full((400_000,), 0.02).bfloat16())
    start = weight[0].item()
    weight.grad = torch.ones_like(weight)
    build([weight], "stochastic", lr=5e-6, weight_decay=0.0).step()
    moved = (start - weight.detach().float()) / 2**-13
    assert set(moved.unique().tolist()) == {0, 1}
    p = 5e-6 / 2**-13
    assert moved.mean().item() == pytest.approx(p, abs=4 * (p / len(weight)) ** 0.5)
    variance = moved.view(400, 1000).mean(dim=1).var().item()
    # The variance of 400 means has a standard error of sqrt(2 / 399) = 7 %.
    assert variance == pytest.approx(p * (1 - p) / 1000, rel=0.3)


def test_rounding_depends_on_the_seed_and_resumes():
    """The step does not change the state of torch's default generator."""

    def start(seed=1):
        weights = make_weights()
        return weights, build(weights, "stochastic", seed=seed)

    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    weights, optimizer = start()
    uninterrupted = run(optimizer, weights, range(4))
    assert torch.equal(torch.rand(4), expected)

    weights, optimizer = start()
    run(optimizer, weights, range(2))
    state = optimizer.state_dict()
    optimizer = build(weights, "stochastic")
    optimizer.load_state_dict(state)
    torch.manual_seed(9)
    resumed = run(optimizer, weights, range(2, 4))
    weights, optimizer = start(seed=2)
    other = run(optimizer, weights, range(4))
    assert all(torch.equal(a, b) for a, b in zip(uninterrupted, resumed, strict=True))
    assert not torch.equal(uninterrupted[0], other[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_do_not_change(value):
    grad, first, second = torch.zeros(64), torch.zeros(64), torch.zeros(64)
    weight = torch.full((64,), value).bfloat16()
    fused_step(weight, grad, first, second, None, step_factors(OPTIONS, 1))
    assert torch.equal(weight.isnan(), torch.full((64,), value).isnan())
    assert value != value or (weight == value).all()


@pytest.mark.parametrize("precision", ["master", "stochastic"])
def test_one_compilation_for_all_shapes(precision):
    """Includes transposed gradients and gradients that are views of DDP's buckets."""
    torch._dynamo.reset()
    weights = make_weights([(8, 8), (8, 4), (7,), (2, 3, 4, 4), (1, 1, 8), (9, 1)])
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer = build(weights, precision)
    with torch._dynamo.config.patch(error_on_recompile=True):
        optimizer.step()
        weights[0].grad = torch.ones_like(weights[0]).t()
        bucket = torch.ones(100).bfloat16()
        weights[1].grad, weights[2].grad = bucket[5:37].view(8, 4), bucket[37:44]
        optimizer.step()
