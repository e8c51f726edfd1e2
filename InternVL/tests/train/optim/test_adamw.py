"""AdamW for bf16 weights: matches float32, rounds without bias, resumes exactly."""

import io
import math

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity

from internvl_chat.constants import WEIGHT_PRECISIONS
from internvl_chat.train.optim import adamw as module
from internvl_chat.train.optim.adamw import (
    Float32AdamW,
    build_adamw,
    bytes_per_parameter,
    scratch_bytes,
)
from internvl_chat.train.optim.fused_step import stochastic_round_

SHAPES = [(64, 48), (7,), (1001,), (33, 5), (1,), ()]


def build(groups, precision, *, lr=1e-3, weight_decay=0.05, seed=1):
    if isinstance(groups[0], nn.Parameter):
        groups = [{"params": groups}]
    options = {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": weight_decay, "seed": seed}
    return build_adamw(groups, precision=precision, **options)


def make_parameters(dtype=torch.bfloat16, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter((0.02 * torch.randn(s, generator=generator)).to(dtype)) for s in shapes]


def set_gradients(parameters, step):
    """Set the gradients of a step: bf16 numbers in each parameter's dtype."""
    generator = torch.Generator().manual_seed(1000 + step)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator).bfloat16().to(p.dtype)


def run(optimizer, steps):
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        set_gradients(parameters, step)
        optimizer.step()
    return [p.detach().clone() for p in parameters]


def as_float32(parameters):
    return [nn.Parameter(p.detach().float()) for p in parameters]


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)


@pytest.fixture(params=["full", "sliced"])
def slices(request, monkeypatch):
    """Run a test with a single slice per parameter and with many."""
    if request.param == "sliced":
        monkeypatch.setitem(module._SLICE, "cpu", 128)


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("precision", WEIGHT_PRECISIONS)
def test_200_steps_at_5e_6_match_float32(precision, weight_decay):
    """The displacement, projected onto that of float32 weights, is the same within 2 %.

    N(0, 0.02) weights get 200 noisy gradients, each with its own mean. A float32 AdamW moves them by up to
    1e-3, in steps of a twentieth of the bf16 spacing (1.2e-4 at 0.02). An individual bf16 weight may
    deviate by more than 2 %, because the spacing is 12 % of its displacement. With a master, the weight is
    the bf16 number nearest to the float32 weight. Stochastic rounding adds noise with zero mean (0.3 % of the
    projection for 100,000 weights). In bf16, nearly all steps are lost.
    """
    generator = torch.Generator().manual_seed(0)
    start = (0.02 * torch.randn(100_000, generator=generator)).bfloat16()
    mean = 0.5 * torch.randn(len(start), generator=generator)
    weight, exact = nn.Parameter(start.clone()), nn.Parameter(start.float())
    optimizer = build([weight], precision, lr=5e-6, weight_decay=weight_decay)
    float32 = torch.optim.AdamW([exact], lr=5e-6, weight_decay=weight_decay, fused=True)
    for _ in range(200):
        weight.grad = (mean + torch.randn(len(start), generator=generator)).bfloat16()
        exact.grad = weight.grad.float()
        optimizer.step()
        float32.step()

    way = exact.detach() - start.float()
    moved = weight.detach().float() - start.float()
    share = (moved @ way / (way @ way)).item()
    if precision == "bf16":
        assert share < 0.2
        assert (moved != 0).float().mean() < 0.2
    else:
        assert share == pytest.approx(1, abs=0.02)
    if precision == "master":
        assert torch.equal(optimizer.state[weight]["master"], exact)
        assert torch.equal(weight, exact.bfloat16())


@pytest.mark.parametrize("precision", ["master", "stochastic"])
def test_float32_parameters_match_torch_adamw(precision, slices):
    """The updates are bit-identical, also with bf16 parameters in the same group."""
    ours, theirs = make_parameters(torch.float32), make_parameters(torch.float32)
    optimizer = build([*ours, *make_parameters(seed=1)], precision)
    moved = run(optimizer, range(5))[: len(ours)]
    assert_same(moved, run(torch.optim.AdamW(theirs, lr=1e-3, weight_decay=0.05, fused=True), range(5)))


def test_masters_match_float32_weights_bit_for_bit(slices):
    """Groups have different weight decay and learning rates, and a gradient is not contiguous."""
    ours = make_parameters()
    theirs = as_float32(ours)

    def groups(parameters):
        return [
            {"params": parameters[:2], "weight_decay": 0.0},
            {"params": parameters[2:], "weight_decay": 0.3, "lr": 1e-2},
        ]

    optimizer = build(groups(ours), "master")
    exact = torch.optim.AdamW(groups(theirs), lr=1e-3, fused=True)
    for step in range(5):
        set_gradients(ours, step)
        ours[0].grad = ours[0].grad.t().contiguous().t()
        set_gradients(theirs, step)
        optimizer.step()
        exact.step()
    assert_same([optimizer.state[p]["master"] for p in ours], theirs)
    assert_same(ours, [p.bfloat16() for p in theirs])


@pytest.mark.parametrize("precision", WEIGHT_PRECISIONS)
def test_resumed_run_matches_uninterrupted_run(precision, slices):
    """Weights and state are bit-identical after loading from a file, including the rounding noise."""

    def start():
        parameters = make_parameters() + make_parameters(torch.float32, seed=1)
        return parameters, build([{"params": parameters[::2]}, {"params": parameters[1::2]}], precision)

    full, uninterrupted = start()
    run(uninterrupted, range(8))

    first, optimizer = start()
    run(optimizer, range(3))
    file = io.BytesIO()
    torch.save({"weights": first, "optimizer": optimizer.state_dict()}, file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    second, resumed = start()
    for parameter, weight in zip(second, saved["weights"], strict=True):
        parameter.data.copy_(weight)
    resumed.load_state_dict(saved["optimizer"])
    run(resumed, range(3, 8))
    assert_same(second, full)
    for ours, theirs in zip(second, full, strict=True):
        assert resumed.state[ours].keys() == uninterrupted.state[theirs].keys()
        for name, value in uninterrupted.state[theirs].items():
            assert value.dtype == resumed.state[ours][name].dtype
            assert torch.equal(value, resumed.state[ours][name])


@pytest.mark.parametrize("old, new", [("bf16", "master"), ("master", "stochastic"), ("stochastic", "master")])
def test_loads_state_saved_with_a_different_precision(old, new):
    parameters = make_parameters()
    before, after = build(parameters, old), build(parameters, new)
    run(before, range(2))
    after.load_state_dict(before.state_dict())
    run(after, range(2, 4))
    state = after.state[parameters[0]]
    assert state["step"] == 4
    assert ("master" in state) == (new == "master")
    assert all(tensor.dtype == torch.float32 for tensor in state.values())


@pytest.mark.parametrize("precision", WEIGHT_PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_matches_bytes_per_parameter(precision, dtype):
    """Counts the weight, gradient and state without the step counter."""
    (parameter,) = make_parameters(dtype, [(64, 64)])
    optimizer = build([parameter], precision)
    run(optimizer, range(1))
    tensors = [parameter, parameter.grad]
    tensors += [t for name, t in optimizer.state[parameter].items() if name != "step"]
    assert sum(t.nbytes for t in tensors) / parameter.numel() == bytes_per_parameter(precision, dtype)


def test_state_of_bf16_weights_is_float32():
    for precision, names in [("master", {"master"}), ("stochastic", set())]:
        (parameter,) = make_parameters(shapes=[(8, 8)])
        optimizer = build([parameter], precision)
        run(optimizer, range(1))
        state = optimizer.state[parameter]
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"} | names
        assert {tensor.dtype for tensor in state.values()} == {torch.float32}
        assert parameter.dtype == torch.bfloat16


def test_bytes_per_parameter():
    assert [bytes_per_parameter(p, torch.bfloat16) for p in ("master", "stochastic", "bf16")] == [16, 12, 8]
    assert {bytes_per_parameter(p, torch.float32) for p in WEIGHT_PRECISIONS} == {16}


@pytest.mark.parametrize("precision", WEIGHT_PRECISIONS)
def test_parameters_without_gradients_do_not_change(precision):
    used, unused = make_parameters(shapes=[(8,), (8,)])
    before = unused.detach().clone()
    optimizer = build([unused, used], precision, lr=1.0)
    used.grad = torch.ones_like(used)
    optimizer.step()
    assert torch.equal(unused, before)
    assert unused not in optimizer.state
    assert not torch.equal(used, before)


@pytest.mark.parametrize("shapes", [[(0, 4)], [(0, 4), (3,)], [(3,), (0,)]])
@pytest.mark.parametrize("precision", WEIGHT_PRECISIONS)
def test_shards_may_be_empty(precision, shapes):
    """With FSDP2, the shards of a small parameter are empty on some ranks."""
    parameters = make_parameters(shapes=shapes)
    before = [p.detach().clone() for p in parameters]
    optimizer = build(parameters, precision, lr=1.0)
    moved = run(optimizer, range(2))
    assert [not torch.equal(a, b) for a, b in zip(before, moved, strict=True)] == [
        p.numel() > 0 for p in parameters
    ]
    assert {optimizer.state[p]["step"].item() for p in parameters} == {2}


def test_rounding_depends_only_on_the_seed():
    """Data-parallel ranks share the seed, so their weights stay identical."""
    first, again, other = (run(build(make_parameters(), "stochastic", seed=s), range(4)) for s in (1, 1, 2))
    assert_same(first, again)
    assert not torch.equal(first[0], other[0])


def test_slices_round_independently(monkeypatch):
    """With one slice per row, the variance within and across rows is binomial.

    A step of 5e-6 moves a weight by a full spacing of 2**-13 with probability p = 5e-6 / 2**-13.
    """
    monkeypatch.setitem(module._SLICE, "cpu", 1024)
    steps = []
    for seed in range(16):
        weight = nn.Parameter(torch.full((256, 1024), 0.02).bfloat16())
        start = weight[0, 0].item()
        weight.grad = torch.ones_like(weight)
        build([weight], "stochastic", lr=5e-6, weight_decay=0, seed=seed).step()
        steps.append((start - weight.detach().float()) / 2**-13)
    moved = torch.stack(steps)
    p = 5e-6 / 2**-13
    assert set(moved.unique().tolist()) == {0, 1}
    assert moved.mean().item() == pytest.approx(p, rel=0.01)
    for axis, count in ((1, 256), (2, 1024)):
        spread = moved.mean(dim=axis).var(dim=1).mean().item()
        assert spread == pytest.approx(p * (1 - p) / count, rel=0.25)


@pytest.mark.parametrize("sign", [1, -1])
def test_stochastic_rounding_is_exact_over_all_noise(sign):
    """Of the 65,536 noise values, exactly the expected fraction rounds away from zero."""
    low, high = torch.tensor([0.02]).bfloat16().float(), torch.tensor([0.02]).bfloat16().float() + 2**-13
    noise = torch.arange(2**16, dtype=torch.int32)
    for share in (0, 2**-16, 0.25, 0.7001953125, 1 - 2**-16):
        rounded = stochastic_round_((sign * (low + share * 2**-13)).repeat(2**16), noise)
        far = (rounded == sign * high).double()
        assert torch.equal(far + (rounded == sign * low), torch.ones_like(far))
        assert far.mean().item() == share


def test_stochastic_rounding_preserves_special_values():
    patterns = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001], dtype=torch.int32).view(torch.float32)
    infinite = torch.tensor([math.inf, -math.inf])
    exact = torch.tensor([0.0, -0.0, 1.0, -3.5, 2.0**-133])
    for amount in (0, 1, 2**16 - 1):

        def round_(values, amount=amount):
            return stochastic_round_(values.clone(), torch.full((len(values),), amount, dtype=torch.int32))

        assert round_(patterns).bfloat16().isnan().all()
        assert torch.equal(round_(infinite), infinite)
        assert torch.equal(round_(exact).view(torch.int32), exact.view(torch.int32))


def test_sharded_parameters():
    """The moments and master of a DTensor are DTensors, so that distributed checkpoints can save them."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for precision in WEIGHT_PRECISIONS:
            plain = make_parameters(shapes=SHAPES[:3])
            sharded = [nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)])) for p in plain]
            left, right = build(plain, precision), build(sharded, precision)
            for step in range(3):
                set_gradients(plain, step)
                for p, s in zip(plain, sharded, strict=True):
                    s.grad = distribute_tensor(p.grad, mesh, [Shard(0)])
                left.step()
                right.step()
            assert_same(plain, [s.full_tensor() for s in sharded])
            assert isinstance(right.state[sharded[0]]["exp_avg"], DTensor)
            assert isinstance(
                right.state[sharded[0]].get("master", right.state[sharded[0]]["exp_avg_sq"]), DTensor
            )
    finally:
        distributed.destroy_process_group()


def test_float32_and_bf16_precision_use_torch_adamw():
    assert type(build(make_parameters(torch.float32), "master")) is torch.optim.AdamW
    assert type(build(make_parameters(), "bf16")) is torch.optim.AdamW
    assert isinstance(build(make_parameters() + make_parameters(torch.float32), "stochastic"), Float32AdamW)


def test_unsupported_parameters_are_rejected():
    embedding = nn.Embedding(4, 4, sparse=True, dtype=torch.bfloat16)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        build([embedding.weight], "master").step()
    with pytest.raises(TypeError, match="float16"):
        build(make_parameters(torch.float16), "master")
    with pytest.raises(ValueError, match="master, stochastic, bf16"):
        build(make_parameters(), "auto")


def test_matrices_are_not_split_on_a_gpu():
    """MLP matrices of Qwen2.5-7B (18944 x 3584) fit in the scratch memory; its embeddings and head do not."""
    mlp, head, norm = 18944 * 3584, 151_674 * 3584, 3584
    assert module._slice_size([norm, mlp], "cuda") == mlp
    assert module._slice_size([norm, mlp, head], "cuda") == 2**28 < head
    assert module._slice_size([norm, mlp], "cpu") == 2**20


@pytest.mark.parametrize(("precision", "elements"), [("master", 1), ("stochastic", 3), ("bf16", 0)])
def test_scratch_bytes(precision, elements):
    on_meta = [torch.empty(18944, 3584, dtype=torch.bfloat16, device="meta"), torch.empty(9, device="meta")]
    assert scratch_bytes(precision, on_meta, "cuda", compiled=False) == 4 * elements * 18944 * 3584
    assert scratch_bytes(precision, on_meta, "cuda", compiled=True) == 0
    assert scratch_bytes(precision, on_meta[1:], "cuda", compiled=False) == 0


@pytest.mark.parametrize("precision", ["master", "stochastic"])
def test_allocations_match_scratch_bytes(precision):
    """A step allocates the scratch memory and a few bytes per slice."""
    parameters = make_parameters(shapes=[(3000, 1000), (10,)])
    optimizer = build(parameters, precision)
    run(optimizer, range(1))
    set_gradients(parameters, 1)
    with torch.profiler.profile(profile_memory=True, activities=[ProfilerActivity.CPU]) as profile:
        optimizer.step()
    used = [event.self_cpu_memory_usage for event in profile.events() if event.name.startswith("aten::")]
    allocated = sum(size for size in used if size > 0)
    assert allocated == pytest.approx(scratch_bytes(precision, parameters, "cpu", compiled=False), abs=4096)
