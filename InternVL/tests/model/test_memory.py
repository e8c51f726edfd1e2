"""Activation memory: matches manual counts and is measured with the kernels of the training device."""

from dataclasses import replace

import pytest
import torch
from model.conftest import make_model
from torch import nn
from transformers import AttentionInterface

from internvl_chat.model.attention import varlen_attention
from internvl_chat.model.io.checkpoint import load_model
from internvl_chat.model.kernels.apply import apply_kernels
from internvl_chat.model.lora.injection import add_lora
from internvl_chat.model.memory import (
    Activations,
    PackSize,
    measure_activations,
    saved_bytes,
    saves_linear_inputs,
)
from internvl_chat.train.freeze import set_trainable

CPU, META = torch.device("cpu"), torch.device("meta")

# ---- saved tensors


def kept(module: nn.Module, x: torch.Tensor) -> int:
    return saved_bytes(module, lambda: module(x))


def rows(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a (5, 4) input that requires a gradient."""
    return torch.ones(5, 4, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2), (torch.float64, 8)])
def test_linear_layer_saves_its_input(dtype, size):
    """The weight's gradient needs the input; the input's gradient needs only the weight."""
    assert kept(nn.Linear(4, 3, dtype=dtype), rows(dtype)) == 5 * 4 * size


def test_frozen_linear_layer_saves_nothing():
    assert kept(nn.Linear(4, 3).requires_grad_(False), rows()) == 0


def test_inputs_of_frozen_linear_layers():
    """As with ZeRO-3: every input that requires a gradient, once."""
    frozen = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4), nn.Linear(4, 2)).requires_grad_(False)
    assert saved_bytes(frozen, lambda: frozen(rows()), linear_inputs=True) == 5 * (4 + 3 + 4) * 4
    assert saved_bytes(frozen, lambda: frozen(torch.ones(5, 4)), linear_inputs=True) == 0
    assert kept(frozen, rows()) == 0  # the hooks are removed


def test_matrix_that_is_not_a_parameter_is_counted():
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
def test_tensors_saved_by_several_layers_are_counted_once(layers, numbers):
    assert kept(nn.Sequential(*layers), rows()) == 4 * numbers


def test_views_of_a_storage_are_counted_once():
    x = rows()
    assert saved_bytes(nn.Identity(), lambda: x * x.view(5, 4)) == 80
    assert saved_bytes(nn.Identity(), lambda: x.T @ x) == 80


def test_tensors_that_are_freed_during_the_call_are_not_counted():
    layer = nn.Linear(4, 3)

    def call():
        constant = layer(torch.eye(4)).detach().sum()
        return layer(rows()) * constant

    # The input of the second call, and the constant.
    assert saved_bytes(layer, call) == 5 * 4 * 4 + 4


def test_every_output_of_a_chain_is_counted():
    """Each operation saves its own output."""

    def call() -> torch.Tensor:
        x = rows()
        for _ in range(10):
            x = x.sigmoid()
        return x

    assert saved_bytes(nn.Identity(), call) == 10 * 80


def test_nothing_is_saved_without_gradients():
    frozen = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid()).requires_grad_(False)
    assert kept(frozen, torch.ones(5, 4)) == 0


def test_saved_bytes_under_no_grad():
    with torch.no_grad():
        assert kept(nn.Linear(4, 3), rows()) == 80
        assert not torch.is_grad_enabled()


# ---- memory of a pack

ACTIVATIONS = Activations(
    layers=4,
    layer_token=10.0,
    layer_square=0.0,
    input_token=1.0,
    supervised=2.0,
    tile=3.0,
    checkpointed_tile=2.0,
)
PACK = PackSize(tokens=10, supervised=5, tiles=2, squares=100)


@pytest.mark.parametrize(
    ("checkpointed", "activations"),
    [
        (0, (4 + 1) * 100),  # four layers, and the activation gradients of one
        (1, (3 + 1 + 1) * 100 + 10),  # one layer keeps only its input and is recomputed later
        (2, (2 + 1 + 1) * 100 + 20),
        (4, (1 + 1) * 100 + 40),
    ],
)
def test_memory_of_a_pack(checkpointed, activations):
    tiles = 2 * (2 if checkpointed else 3)
    assert ACTIVATIONS.for_pack(PACK, checkpointed) == {
        "activations": activations,
        "logits": 10,
        "vision": tiles,
    }


@pytest.mark.parametrize(("checkpointed", "layers"), [(0, 4), (1, 5), (4, 2)])
def test_gradients_replace_the_activations_of_a_small_last_layer(checkpointed, layers):
    found = replace(ACTIVATIONS, small_last_layer=True).for_pack(PACK, checkpointed)["activations"]
    assert found == layers * 100 + checkpointed * 10


@pytest.mark.parametrize(("checkpointed", "layers"), [(0, 5), (1, 5), (4, 2)])
def test_squares_count_in_every_layer_in_memory(checkpointed, layers):
    more = replace(ACTIVATIONS, layer_square=0.5).for_pack(PACK, checkpointed)["activations"]
    assert more - ACTIVATIONS.for_pack(PACK, checkpointed)["activations"] == layers * 50


# ---- memory of a model


def load(folder, dtype: torch.dtype = torch.bfloat16, lora: int = 0, attn: str = "varlen"):
    model = load_model(folder, image_context_id=0, dtype=dtype, attn=attn)
    if lora:
        add_lora(model, llm_rank=lora)
    set_trainable(model, freeze_llm=False, freeze_mlp=False, freeze_backbone=True)
    return model.train()


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_tokens_and_tiles_by_hand(tiny_model, dtype, size):
    model = load(tiny_model, dtype)
    found = measure_activations(model, CPU)
    vocabulary = model.language_model.config.vocab_size
    assert (found.layers, found.input_token) == (2, 48 * size)
    # Logits and their gradient, three float32 copies; the token's hidden state and its gradient.
    assert found.supervised == vocabulary * (2 * size + 12) + 2 * 48 * size
    apply_kernels(model, CPU)  # the gradient overwrites the logits
    assert measure_activations(model, CPU).supervised == vocabulary * size + 2 * 48 * size
    model.language_model.requires_grad_(False)
    assert measure_activations(model, CPU).supervised == 2 * 48 * size
    assert found.tile == found.checkpointed_tile == 4 * 4 * 48 * size


def test_trained_vision_tower_saves_activations(tiny_model):
    """Compares packs with three and two tiles."""
    model = load(tiny_model, torch.float32)
    frozen = measure_activations(model, CPU)
    model.vision_model.requires_grad_(True)
    trained, tower = measure_activations(model, CPU), model.vision_model
    side = tower.config.image_size
    two, three = (saved_bytes(tower, lambda n=n: tower(torch.zeros(n, 3, side, side))) for n in (2, 3))
    assert trained.tile - frozen.tile == pytest.approx(three - two, rel=0.02)
    layers, positions = tower.config.num_hidden_layers, tower.config.grid**2 + 1
    inputs = layers * positions * tower.config.hidden_size * 4
    kept = trained.tile - frozen.tile
    assert trained.checkpointed_tile - frozen.checkpointed_tile == pytest.approx(inputs + kept / layers)


def test_layer_memory_matches_the_full_model(tiny_model):
    """Compares language models with two layers and one."""
    model = load(tiny_model, torch.float32)
    found, llm = measure_activations(model, CPU), model.language_model.get_decoder()
    tokens, kept_by = 96, []
    x = torch.randn(1, tokens, 48, requires_grad=True)
    for layers in (1, 2):
        layer_list, llm.config.num_hidden_layers = llm.layers, layers
        llm.layers = llm.layers[:layers]
        kept_by.append(saved_bytes(llm, lambda: llm(inputs_embeds=x, use_cache=False)))
        llm.layers = layer_list
    assert found.layer_token == pytest.approx((kept_by[1] - kept_by[0]) / tokens, rel=0.02)


def test_attention_weights_of_long_records_are_counted(tiny_model):
    """In bf16 on a CPU, a layer saves half of the weights (causal) of 4 heads, two bytes each."""
    assert measure_activations(load(tiny_model, torch.float32), CPU).layer_square == 0
    model = load(tiny_model, torch.bfloat16)
    found = measure_activations(model, CPU)
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


def test_checkpointed_layer_saves_only_its_input(tiny_model):
    model = load(tiny_model, torch.float32)
    found, llm = measure_activations(model, CPU), model.language_model.get_decoder()
    tokens, kept_by = 96, []
    x = torch.randn(1, tokens, 48, requires_grad=True)
    for checkpointed in (0, 1):
        model.checkpoint_layers(checkpointed)
        kept_by.append(saved_bytes(llm, lambda: llm(inputs_embeds=x, use_cache=False)))
    saved = (found.layer_token - found.input_token) * tokens
    assert kept_by[0] - kept_by[1] == pytest.approx(saved, rel=0.05)


@pytest.mark.parametrize(
    ("zero", "saves"),
    [
        ({}, False),
        ({"stage": 2}, False),
        ({"stage": 3}, True),
        ({"stage": 3, "memory_efficient_linear": False}, False),
    ],
)
def test_layouts_that_save_linear_inputs(zero, saves):
    assert saves_linear_inputs(zero) is saves


def test_linear_inputs_are_those_of_zero3(tiny_model, monkeypatch):
    """Compares with DeepSpeed's own function, for frozen layers with adapters."""
    zero3 = pytest.importorskip("deepspeed.runtime.zero.linear")
    model = load(tiny_model, torch.float32, lora=4)
    set_trainable(model, freeze_llm=True, freeze_mlp=True, freeze_backbone=True)
    plain, planned = (measure_activations(model, CPU, linear_inputs=inputs) for inputs in (False, True))
    assert planned.layer_token > plain.layer_token
    monkeypatch.setattr(nn.functional, "linear", zero3.zero3_linear_wrap)
    assert measure_activations(model, CPU).layer_token == pytest.approx(planned.layer_token, rel=0.01)


def test_measuring_changes_neither_model_nor_random_numbers(tiny_model):
    model = load(tiny_model, lora=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = measure_activations(model, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert measure_activations(model, CPU) == first
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# ---- the training device


def gpu_kernel(module, query, key, value, attention_mask, cu_seq_lens_q=None, max_length_q=None, **options):
    """Simulates flash-attn: no CPU support, only packed rows, no L x L weights."""
    if query.device.type == "cpu":
        raise RuntimeError("FlashAttention only supports CUDA tensors")
    for name, given in {"q": (cu_seq_lens_q, max_length_q), "k": given_k(options)}.items():
        bounds, longest = given
        assert bounds.dtype == torch.int32 and bounds.device == query.device, name
        assert len(bounds) == 2 and longest == query.shape[2], name
    assert attention_mask is None
    return (query * value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)).transpose(1, 2), None


def given_k(options: dict) -> tuple:
    return options["cu_seq_lens_k"], options["max_length_k"]


@pytest.mark.parametrize("lora", [0, 4])
def test_a_kernel_of_the_training_device_is_measured_there(tiny_model, lora):
    """The model is on the CPU, where the kernel does not run; a meta device simulates the GPU."""
    AttentionInterface.register("gpu_only", gpu_kernel)
    model = load(tiny_model, lora=lora, attn="gpu_only")
    with pytest.raises(RuntimeError, match="only supports CUDA tensors"):
        measure_activations(model, CPU)
    found = measure_activations(model, META)
    assert found.layer_token > 0 and found.layer_square == 0
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    model.vision_model.requires_grad_(True)
    assert measure_activations(model, META).tile > found.tile
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_copy_on_the_device_saves_the_same_bytes(tiny_model):
    """Uses a kernel that runs on both devices, in float32: in other dtypes the norms differ."""

    def both(module, query, key, value, attention_mask, **options):
        return (query * query).transpose(1, 2), None

    AttentionInterface.register("both", both)
    model = load(tiny_model, torch.float32, attn="both")
    assert measure_activations(model, META) == measure_activations(model, CPU)


def test_a_layer_on_the_training_device_is_not_copied(tiny_model, monkeypatch):
    seen = []

    def kernel(module, *args, **options):
        seen.append(module)
        return varlen_attention(module, *args, **options)

    AttentionInterface.register("spy", kernel)
    model = load(tiny_model, attn="spy")
    measure_activations(model, CPU)
    assert set(seen) == {model.language_model.get_decoder().layers[0].self_attn}


def test_dynamic_rope_on_the_meta_device():
    """All InternVL3 models have dynamic RoPE, whose forward pass does not run there."""
    dynamic = make_model(llm={"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}})
    assert measure_activations(dynamic.to(META), META) == measure_activations(make_model().to(META), META)
