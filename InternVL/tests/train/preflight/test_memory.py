"""The memory plan: bytes that autograd keeps, counted by hand, and what is chosen from them."""

import dataclasses
import itertools
import math
import random

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from internvl_chat.data.length_cache import Lengths
from internvl_chat.data.order import StepSampler
from internvl_chat.data.packing import StepPlanner
from internvl_chat.model.checkpoint import load_model
from internvl_chat.model.lora import add_lora
from internvl_chat.train.freeze import set_trainable
from internvl_chat.train.preflight.memory import (
    MemoryModel,
    MemoryPlan,
    PackSize,
    capacity,
    choose,
    largest_anywhere,
    largest_pack,
    measure_memory,
    saved_bytes,
)

CPU = torch.device("cpu")
WHOLE = {"weights": 1, "state": 1}

# ---- what autograd keeps


def kept(module: nn.Module, x: torch.Tensor) -> int:
    return saved_bytes(module, lambda: module(x))


def rows(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(5, 4) numbers, as if from a layer before."""
    return torch.ones(5, 4, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2), (torch.float64, 8)])
def test_a_matrix_keeps_its_input(dtype, size):
    """The weight's gradient needs the input; the input's gradient needs the weight, which is there anyway."""
    assert kept(nn.Linear(4, 3, dtype=dtype), rows(dtype)) == 5 * 4 * size


def test_a_frozen_matrix_keeps_nothing():
    assert kept(nn.Linear(4, 3).requires_grad_(False), rows()) == 0


def test_a_matrix_that_is_no_parameter_is_counted():
    other = torch.ones(4, 3)
    assert saved_bytes(nn.Linear(4, 3), lambda: rows() @ other) == 4 * 3 * 4


@pytest.mark.parametrize(
    ("layers", "numbers"),
    [
        ([nn.Sigmoid()], 5 * 4),  # its output
        ([nn.Linear(4, 3), nn.Sigmoid()], 5 * 4 + 5 * 3),
        ([nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 2)], 5 * 4 + 5 * 3),  # the output is the next input
        ([nn.Linear(4, 3), nn.SiLU(), nn.Linear(3, 2)], 5 * 4 + 2 * 5 * 3),  # its input, and its output
        ([nn.Identity()], 0),
    ],
    ids=["sigmoid", "matrix, sigmoid", "matrix, sigmoid, matrix", "matrix, silu, matrix", "nothing"],
)
def test_what_several_layers_keep_is_counted_once(layers, numbers):
    assert kept(nn.Sequential(*layers), rows()) == 4 * numbers


def test_views_of_one_memory_are_counted_once():
    x = rows()
    assert saved_bytes(nn.Identity(), lambda: x * x.view(5, 4)) == 80
    assert saved_bytes(nn.Identity(), lambda: x.T @ x) == 80


def test_every_output_of_a_chain_is_counted():
    """Each is kept for its own derivative, although no name is left for it."""

    def call() -> torch.Tensor:
        x = rows()
        for _ in range(10):
            x = x.sigmoid()
        return x

    assert saved_bytes(nn.Identity(), call) == 10 * 80


def test_nothing_is_kept_of_what_needs_no_gradient():
    frozen = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid()).requires_grad_(False)
    assert kept(frozen, torch.ones(5, 4)) == 0


def test_it_counts_where_gradients_are_switched_off():
    with torch.no_grad():
        assert kept(nn.Linear(4, 3), rows()) == 80
        assert not torch.is_grad_enabled()


# ---- what a step needs


MEMORY = MemoryModel(
    weights=100,
    gradients=10,
    trained={"master": 60, "stochastic": 40, "bf16": 20},
    layers=4,
    layer_token=10.0,
    input_token=1.0,
    supervised=2.0,
    tile=3.0,
    recomputed_tile=3.0,
)
# 5 * 2 + 2 * 3 = 16 for the head and the tiles.
PACK = PackSize(tokens=10, supervised=5, tiles=2)


@pytest.mark.parametrize(
    ("precision", "recomputed", "needed"),
    [
        ("master", 0, 100 + 60 + 4 * 10 * 10 + 16),
        ("stochastic", 0, 100 + 40 + 4 * 10 * 10 + 16),
        ("bf16", 0, 100 + 20 + 4 * 10 * 10 + 16),
        # Three layers keep all, one its input, and one is in work.
        ("master", 1, 100 + 60 + (3 * 10 + 1 + 10) * 10 + 16),
        ("master", 2, 100 + 60 + (2 * 10 + 2 + 10) * 10 + 16),
        ("master", 4, 100 + 60 + (4 + 10) * 10 + 16),
    ],
)
def test_what_a_step_needs(precision, recomputed, needed):
    assert MEMORY.needed(PACK, precision, recomputed) == needed


def test_what_the_first_optimizer_step_adds():
    assert [MEMORY.optimizer_state(name) for name in MEMORY.trained] == [50, 30, 10]


def plan(needed: float, precision: str = "auto", grad_checkpoint: str = "auto") -> MemoryPlan:
    """What is chosen where as many bytes may be used; 92 % of a device may be."""
    available = math.nextafter(needed / 0.92, math.inf)
    return choose(MEMORY, PACK, available, precision=precision, grad_checkpoint=grad_checkpoint)


@pytest.mark.parametrize(
    ("usable", "precision", "recomputed"),
    [
        (1000, "master", 0),
        (576, "master", 0),
        # One recomputed layer is no use: it is in work while the others are there.
        (575, "master", 2),
        (496, "master", 2),
        (495, "master", 3),
        (405, "master", 4),
        # Masters come first, however many layers are recomputed for them.
        (316, "master", 4),
        (315, "stochastic", 4),
        (296, "stochastic", 4),
        (10, "stochastic", 4),  # nothing fits: the least there is
    ],
)
def test_masters_come_first_and_then_the_fewest_recomputed_layers(usable, precision, recomputed):
    assert plan(usable) == MemoryPlan(precision, recomputed)


@pytest.mark.parametrize("precision", ["master", "stochastic", "bf16"])
@pytest.mark.parametrize("usable", [10, 1000])
def test_a_precision_that_is_asked_for_is_taken(precision, usable):
    assert plan(usable, precision) == MemoryPlan(precision, 4 if usable == 10 else 0)


@pytest.mark.parametrize(("asked", "recomputed"), [("True", 4), ("False", 0)])
@pytest.mark.parametrize(
    ("usable", "precision"), [(1000, "master"), (10, "stochastic")], ids=["enough", "too little"]
)
def test_recomputing_that_is_asked_for_is_done(asked, recomputed, usable, precision):
    assert plan(usable, grad_checkpoint=asked) == MemoryPlan(precision, recomputed)


def test_without_recomputing_stochastic_rounding_may_be_what_fits():
    assert plan(575, grad_checkpoint="False") == MemoryPlan("stochastic", 0)
    assert plan(315, grad_checkpoint="True") == MemoryPlan("stochastic", 4)


def test_tiles_need_less_where_layers_are_recomputed():
    memory = dataclasses.replace(MEMORY, recomputed_tile=1.0)
    assert memory.needed(PACK, "master", 0) == MEMORY.needed(PACK, "master", 0)
    assert memory.needed(PACK, "master", 1) == MEMORY.needed(PACK, "master", 1) - 2 * (3 - 1)


def test_what_is_chosen_is_the_first_that_fits_of_all():
    draw = random.Random(0)
    for _ in range(300):
        layers = draw.randint(1, 6)
        memory = MemoryModel(
            draw.randint(0, 50), 5, {"master": draw.randint(40, 80), "stochastic": draw.randint(5, 40)},
            layers, draw.uniform(1, 9), draw.uniform(0, 1), 1.0, 1.0, 1.0,
        )  # fmt: skip
        pack = PackSize(draw.randint(1, 20), 3, 2)
        available = draw.uniform(0, 1200)
        options = itertools.product(("master", "stochastic"), range(layers + 1))
        fits = [o for o in options if memory.needed(pack, *o) <= 0.92 * available]
        found = choose(memory, pack, available, precision="auto", grad_checkpoint="auto")
        assert (found.weight_precision, found.recomputed_layers) == (fits or [("stochastic", layers)])[0]


# ---- the largest pack


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("max_tokens", [None, 300])
def test_the_largest_pack_is_that_which_needs_most(processes, max_tokens):
    rng = np.random.default_rng(0)
    tokens = rng.integers(20, 200, 101)
    lengths = Lengths(tokens, rng.integers(1, 20, 101), rng.integers(0, 7, 101))
    for rank in range(processes):
        planner = StepPlanner(processes, tokens, tokens, max_tokens, records_per_pack=2)
        sampler = StepSampler([101], step_records=12, planner=planner, rank=rank, seed=3)
        sizes = []
        # Another order in each epoch makes other packs.
        for epoch, number in itertools.product(range(3), range(len(sampler))):
            for draws in sampler.packs(epoch, number):
                records = [draw.index for draw in draws]
                columns = (lengths.tokens, lengths.supervised, lengths.tiles)
                sums = [int(column[records].sum()) for column in columns]
                size = PackSize(*sums, squares=int((tokens[records] ** 2).sum()))
                sizes.append((MEMORY.needed(size, "master", 0), size, draws))
        needed, size, _ = max(sizes, key=lambda one: one[0])
        found, draws, packs = largest_pack(sampler, lengths, MEMORY, 3 * len(sampler))
        assert found == size and MEMORY.needed(found, "master", 0) == needed
        assert packs == max(len(sampler.packs(e, n)) for e in range(3) for n in range(len(sampler)))
        assert draws in [other for of_it, _, other in sizes if of_it == needed]


def test_tiles_and_supervised_tokens_make_a_pack_large_too():
    tokens, supervised, tiles = np.array([10, 9, 9]), np.array([1, 1, 500]), np.array([0, 400, 0])
    planner = StepPlanner(1, tokens, tokens)
    sampler = StepSampler([3], step_records=3, planner=planner, strategy="sequential")
    found, draws, _ = largest_pack(sampler, Lengths(tokens, supervised, tiles), MEMORY, 1)
    assert (found, [draw.index for draw in draws]) == (
        PackSize(9, 1, 400, 81),
        [1],
    )  # 1200 of 3 beside 1000 of 2


def test_all_processes_take_the_largest_of_all(monkeypatch):
    assert largest_anywhere(PACK, MEMORY, 1) is PACK
    others = [PACK, PackSize(5, 5, 200), PackSize(10, 6, 2)]

    def gather(into: list, own: PackSize) -> None:
        assert own is PACK
        into[:] = others

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    assert largest_anywhere(PACK, MEMORY, 3) == others[1]


def test_processes_share_the_memory_that_is_free(monkeypatch):
    class Free:
        available = 12_000_000_000

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Free)
    own = psutil.Process().memory_info().rss
    assert capacity(CPU) == pytest.approx(12e9 + own, abs=5e7)
    assert capacity(CPU, processes=3) == pytest.approx(4e9 + own, abs=5e7)


# ---- what a model needs


def load(folder, dtype: torch.dtype = torch.bfloat16, lora: int = 0, **freeze):
    model = load_model(folder, image_context_id=0, dtype=dtype, attn="varlen")
    if lora:
        add_lora(model, llm_rank=lora)
    frozen = {"freeze_llm": False, "freeze_mlp": False, "freeze_backbone": True, **freeze}
    set_trainable(model, **frozen)
    return model.train()


@pytest.fixture(scope="module")
def numbers(tiny_model) -> dict[str, int]:
    """How many numbers each part of the model on disk has."""
    shapes = {name: tensor.shape for name, tensor in load_file(tiny_model / "model.safetensors").items()}
    parts = ("vision_model", "mlp1", "language_model")
    return {p: sum(s.numel() for n, s in shapes.items() if n.startswith(p + ".")) for p in parts}


# Bytes of gradient and optimizer state: 2 and masters, momentum and variance in float32; or in bfloat16.
STATE = {"master": 2 + 12, "stochastic": 2 + 8, "bf16": 2 + 4}


@pytest.mark.parametrize("shards", [WHOLE, {"weights": 1, "state": 2}, {"weights": 4, "state": 4}])
def test_weights_gradients_and_state_by_hand(tiny_model, numbers, shards):
    found = measure_memory(load(tiny_model), shards=shards)
    trained = numbers["mlp1"] + numbers["language_model"]
    assert found.weights == 2 * sum(numbers.values()) // shards["weights"]
    assert found.gradients == 2 * trained // shards["state"]
    assert found.trained == {name: size * trained // shards["state"] for name, size in STATE.items()}
    assert found.layers == 2


def test_float32_weights_are_stepped_alike_whatever_the_precision(tiny_model, numbers):
    found = measure_memory(load(tiny_model, torch.float32), shards=WHOLE)
    trained = numbers["mlp1"] + numbers["language_model"]
    assert (found.weights, found.gradients) == (4 * sum(numbers.values()), 4 * trained)
    assert set(found.trained.values()) == {(4 + 8) * trained}


def test_only_adapters_need_gradients_where_only_they_are_trained(tiny_model, numbers):
    """Width 48, 4 heads and 2 key/value heads of 12; a rank-4 adapter of an a x b matrix has 4 (a + b)."""
    model = load(tiny_model, lora=4, freeze_llm=True, freeze_mlp=True)
    config = model.language_model.config
    width, inner = 48, config.intermediate_size
    shapes = [(width, 48), (width, 24), (width, 24), (48, width)]
    shapes += [(width, inner), (width, inner), (inner, width)]
    adapters = 2 * 4 * sum(a + b for a, b in shapes)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == adapters
    found = measure_memory(model, shards=WHOLE)
    size = next(p for n, p in model.named_parameters() if ".lora_" in n).element_size()
    assert found.weights == 2 * sum(numbers.values()) + size * adapters
    assert found.gradients == size * adapters


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_what_tokens_and_tiles_need_by_hand(tiny_model, dtype, size):
    model = load(tiny_model, dtype)
    found = measure_memory(model, shards=WHOLE)
    vocabulary = model.language_model.config.vocab_size
    assert found.input_token == 48 * size
    # Logits, which become their gradient; the token's own state and its gradient.
    assert found.supervised == vocabulary * size + 2 * 48 * size
    model.language_model.requires_grad_(False)
    assert measure_memory(model, shards=WHOLE).supervised == 2 * 48 * size
    model.language_model.lm_head.__class__ = nn.Linear  # logits, their gradient, three of them in float32
    assert measure_memory(model, shards=WHOLE).supervised == vocabulary * (2 * size + 12) + 2 * 48 * size
    assert found.tile == found.recomputed_tile == 4 * 4 * 48 * size


def test_a_vision_tower_that_is_trained_keeps_its_activations(tiny_model):
    """The tower of three tiles beside that of two: each keeps its own input, and nothing else is shared."""
    model = load(tiny_model, torch.float32)
    frozen = measure_memory(model, shards=WHOLE)
    model.vision_model.requires_grad_(True)
    trained, tower = measure_memory(model, shards=WHOLE), model.vision_model
    side = tower.config.image_size
    two, three = (saved_bytes(tower, lambda n=n: tower(torch.zeros(n, 3, side, side))) for n in (2, 3))
    assert trained.tile - frozen.tile == pytest.approx(three - two, rel=0.02)
    layers, positions = tower.config.num_hidden_layers, tower.config.grid**2 + 1
    inputs = layers * positions * tower.config.hidden_size * 4
    kept = trained.tile - frozen.tile
    assert trained.recomputed_tile - frozen.recomputed_tile == pytest.approx(inputs + kept / layers)


def test_what_a_layer_keeps_of_a_token_is_what_it_keeps_in_the_whole_model(tiny_model):
    """Two layers beside one: the difference of what autograd keeps in the language model."""
    model = load(tiny_model, torch.float32)
    found, llm = measure_memory(model, shards=WHOLE), model.language_model.get_decoder()
    tokens, kept_by = 96, []
    x = torch.randn(1, tokens, 48, requires_grad=True)
    for layers in (1, 2):
        layer_list, llm.config.num_hidden_layers = llm.layers, layers
        llm.layers = llm.layers[:layers]
        kept_by.append(saved_bytes(llm, lambda: llm(inputs_embeds=x, use_cache=False)))
        llm.layers = layer_list
    assert found.layer_token == pytest.approx((kept_by[1] - kept_by[0]) / tokens, rel=0.02)


def test_attention_weights_of_long_records_are_counted(tiny_model):
    """In bf16 on a CPU a layer keeps them: 4 heads, of which causality leaves half, two bytes each."""
    assert measure_memory(load(tiny_model, torch.float32), shards=WHOLE).layer_square == 0
    model = load(tiny_model, torch.bfloat16)
    found = measure_memory(model, shards=WHOLE)
    assert found.layer_square == pytest.approx(4 * 2 / 2, rel=0.01)
    tokens, llm = 1024, model.language_model.get_decoder()
    x = torch.randn(1, tokens, 48, dtype=torch.bfloat16, requires_grad=True)
    positions = torch.arange(tokens)[None]
    rotary = llm.rotary_emb(x, positions)
    kept = saved_bytes(
        llm.layers[0],
        lambda: llm.layers[0](x, attention_mask=None, position_ids=positions, position_embeddings=rotary),
    )
    assert found.layer_token * tokens + found.layer_square * tokens**2 == pytest.approx(kept, rel=0.01)


def test_the_longer_record_makes_a_pack_larger_where_squares_count():
    memory = dataclasses.replace(MEMORY, layer_square=1.0)
    tokens, none = np.array([10, 6, 6]), np.zeros(3, int)
    planner = StepPlanner(1, tokens, tokens, max_packed_tokens=12)
    sampler = StepSampler([3], step_records=3, planner=planner, strategy="sequential")
    found, draws, _ = largest_pack(sampler, Lengths(tokens, none, none), memory, 1)
    assert (found, [draw.index for draw in draws]) == (PackSize(10, 0, 0, 100), [0])
    assert largest_pack(sampler, Lengths(tokens, none, none), MEMORY, 1).size == PackSize(12, 0, 0, 72)
    for recomputed, layers in ((0, 4), (1, 4), (4, 1)):  # those that keep all, and one that is in work
        more = memory.needed(found, "bf16", recomputed) - MEMORY.needed(found, "bf16", recomputed)
        assert more == layers * 100


def test_recomputing_keeps_the_inputs_of_layers_only(tiny_model):
    model = load(tiny_model, torch.float32)
    found, llm = measure_memory(model, shards=WHOLE), model.language_model.get_decoder()
    tokens, kept_by = 96, []
    x = torch.randn(1, tokens, 48, requires_grad=True)
    for recomputed in (0, 1):
        model.recompute_layers(recomputed)
        kept_by.append(saved_bytes(llm, lambda: llm(inputs_embeds=x, use_cache=False)))
    saved = (found.layer_token - found.input_token) * tokens
    assert kept_by[0] - kept_by[1] == pytest.approx(saved, rel=0.05)


def test_measuring_leaves_the_model_and_the_random_numbers_alone(tiny_model):
    model = load(tiny_model, lora=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = measure_memory(model, shards=WHOLE)
    assert torch.equal(torch.get_rng_state(), state)
    assert measure_memory(model, shards=WHOLE) == first
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
