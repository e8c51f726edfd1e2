"""The vision tower matches explicit formulas: blocks, position embeddings, stochastic depth."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_within_rounding, rounding_bound, terms_of
from model.conftest import randomize
from torch import nn

from internvl_chat.model.configuration import InternVisionConfig
from internvl_chat.model.modeling_intern_vit import InternVisionEncoderLayer, InternVisionModel

PATCH = 14


def config(**changes) -> InternVisionConfig:
    options = {
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "image_size": 56,
        "qkv_bias": True,
        "qk_normalization": False,
        "norm_type": "layer_norm",
    }
    return InternVisionConfig(**{**options, **changes})


def tower(attn: str = "sdpa", **changes) -> InternVisionModel:
    model = InternVisionModel(config(**changes), attn)
    randomize(model, seed=0)
    return model.eval()


def tiles(number: int = 2, size: int = 56, seed: int = 1) -> torch.Tensor:
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(seed))


def normed(x: torch.Tensor, weights: dict[str, torch.Tensor], name: str, eps: float) -> torch.Tensor:
    """Apply layer norm if the weights include a bias, otherwise RMS norm."""
    if f"{name}.bias" in weights:
        x = x - x.mean(dim=-1, keepdim=True)
        x = x / torch.sqrt(x.pow(2).mean(dim=-1, keepdim=True) + eps)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]
    return x / torch.sqrt(x.pow(2).mean(dim=-1, keepdim=True) + eps) * weights[f"{name}.weight"]


def block_by_hand(x: torch.Tensor, layer: InternVisionEncoderLayer, heads: int, eps: float) -> torch.Tensor:
    """Compute a pre-norm block in float64, head by head."""
    weights = {name: p.detach().double() for name, p in layer.state_dict().items()}
    x = x.double()
    y = normed(x, weights, "norm1", eps)
    qkv = y @ weights["attn.qkv.weight"].T + weights.get("attn.qkv.bias", 0)
    width = x.shape[-1]
    q, k, v = qkv[..., :width], qkv[..., width : 2 * width], qkv[..., 2 * width :]
    if "attn.q_norm.weight" in weights:  # across all heads
        q, k = normed(q, weights, "attn.q_norm", eps), normed(k, weights, "attn.k_norm", eps)
    size = width // heads
    outputs = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size)
        weight = scores.exp() / scores.exp().sum(dim=-1, keepdim=True)
        outputs.append(weight @ v[..., part])
    y = torch.cat(outputs, dim=-1) @ weights["attn.proj.weight"].T + weights["attn.proj.bias"]
    x = x + y * weights["ls1"]
    y = normed(x, weights, "norm2", eps) @ weights["mlp.fc1.weight"].T + weights["mlp.fc1.bias"]
    y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
    y = y @ weights["mlp.fc2.weight"].T + weights["mlp.fc2.bias"]
    return x + y * weights["ls2"]


@pytest.mark.parametrize("attn", ["eager", "sdpa", "varlen"])
@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("qk_normalization", [True, False])
@pytest.mark.parametrize("norm_type", ["layer_norm", "rms_norm"])
def test_a_block(norm_type: str, qk_normalization: bool, qkv_bias: bool, attn: str) -> None:
    options = config(
        norm_type=norm_type, qk_normalization=qk_normalization, qkv_bias=qkv_bias, layer_norm_eps=0.01
    )
    layer = InternVisionEncoderLayer(options, attn, 0.0)
    randomize(layer, seed=3)
    x = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(2))
    names = {name for name, _ in layer.named_parameters()}
    assert ("norm1.bias" in names) == (norm_type == "layer_norm")
    assert ("attn.q_norm.weight" in names) == qk_normalization
    assert ("attn.qkv.bias" in names) == qkv_bias
    expected = block_by_hand(x, layer, heads=3, eps=0.01)
    assert_within_rounding(layer(x), expected, terms_of(layer))


def test_initial_layer_scale() -> None:
    layer = InternVisionEncoderLayer(config(initializer_factor=0.3), "sdpa", 0.0)
    for scale in (layer.ls1, layer.ls2):
        assert torch.equal(scale, torch.full((24,), 0.3))
    assert layer.ls1.data_ptr() != layer.ls2.data_ptr()


def test_embedding_patch_by_patch() -> None:
    model = tower()
    images = tiles()
    found = model.embeddings(images)
    weights = {name: p.detach().double() for name, p in model.embeddings.state_dict().items()}
    kernel = weights["patch_embedding.weight"].flatten(1)
    expected = torch.empty(2, 17, 24, dtype=torch.float64)
    for n in range(2):
        expected[n, 0] = weights["class_embedding"][0, 0] + weights["position_embedding"][0, 0]
        for row in range(4):
            for column in range(4):
                y, x = PATCH * row, PATCH * column
                patch = images[n, :, y : y + PATCH, x : x + PATCH].double().flatten()
                position = 1 + 4 * row + column
                expected[n, position] = kernel @ patch + weights["patch_embedding.bias"]
                expected[n, position] += weights["position_embedding"][0, position]
    assert_within_rounding(found, expected, terms=3 * PATCH**2)


@pytest.mark.parametrize("select_layer", range(-4, 4))
def test_select_layer_indexes_hidden_states(select_layer: int) -> None:
    model = tower()
    hidden_states = [model.embeddings(tiles())]
    for layer in model.encoder.layers:
        hidden_states.append(layer(hidden_states[-1]))
    assert torch.equal(model(tiles(), select_layer), hidden_states[select_layer])


@pytest.mark.parametrize(("select_layer", "runs"), [(-1, 3), (-2, 2), (1, 1), (0, 0)])
def test_layers_after_select_layer_do_not_run(select_layer: int, runs: int) -> None:
    model, calls = tower(), []
    for number, layer in enumerate(model.encoder.layers):
        layer.register_forward_hook(lambda *_, n=number: calls.append(n))
    model(tiles(), select_layer)
    assert calls == list(range(runs))


def resized_by_hand(position: torch.Tensor, old: int, new: int) -> torch.Tensor:
    """Resize the patch positions like an `old` x `old` image (bicubic); keep the class token's position."""
    picture = torch.stack(
        [torch.stack([position[0, 1 + row * old + column] for column in range(old)]) for row in range(old)]
    )
    picture = F.interpolate(
        picture.permute(2, 0, 1)[None], size=(new, new), mode="bicubic", align_corners=False
    )
    flat = [picture[0, :, row, column] for row in range(new) for column in range(new)]
    return torch.stack([position[0, 0], *flat])[None]


@pytest.mark.parametrize("image_size", [28, 84, 112])
def test_resized_positions(image_size: int) -> None:
    model = tower()
    before = model.embeddings.position_embedding.detach().clone()
    model.embeddings.position_embedding.requires_grad_(False)
    model.resize_positions(image_size)
    grid = image_size // PATCH
    after = model.embeddings.position_embedding
    # Bicubic interpolation is a weighted sum of 4 x 4 neighbors.
    assert_within_rounding(after, resized_by_hand(before, 4, grid), terms=16)
    assert isinstance(after, nn.Parameter) and not after.requires_grad
    assert model.config.image_size == image_size
    assert model(tiles(size=image_size)).shape == (2, 1 + grid**2, 24)


def test_resizing_to_the_same_size_changes_nothing() -> None:
    model = tower()
    parameter, before = model.embeddings.position_embedding, model(tiles())
    model.resize_positions(56)
    assert model.embeddings.position_embedding is parameter
    assert torch.equal(model(tiles()), before)


@pytest.mark.parametrize("image_size", [28, 84])
def test_tiles_of_another_size(image_size: int) -> None:
    model, resized = tower(), tower()
    resized.resize_positions(image_size)
    images = tiles(size=image_size)
    assert_within_rounding(model(images), resized(images), terms_of(model))
    assert model.config.image_size == 56
    assert model.embeddings.position_embedding.shape == (1, 17, 24)


def test_stochastic_depth_rates() -> None:
    model = tower(drop_path_rate=0.4)
    rates = [getattr(layer.drop_path1, "drop_prob", 0.0) for layer in model.encoder.layers]
    assert rates == pytest.approx([0.0, 0.2, 0.4])
    assert rates == pytest.approx([getattr(x.drop_path2, "drop_prob", 0.0) for x in model.encoder.layers])
    assert isinstance(model.encoder.layers[0].drop_path1, nn.Identity)


def test_stochastic_depth_only_in_training() -> None:
    layer = InternVisionEncoderLayer(config(), "sdpa", 0.25)
    randomize(layer, seed=3)
    rows = 64
    x = torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(2)).repeat(rows, 1, 1)
    plain = InternVisionEncoderLayer(config(), "sdpa", 0.0)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(x), plain(x))

    torch.manual_seed(0)
    found = layer.train()(x)
    outcomes = []
    for first, second in itertools.product((0, 1 / 0.75), repeat=2):  # either dropped, or kept and scaled up
        y = x[:1] + first * plain.attn(plain.norm1(x[:1])) * plain.ls1
        outcomes.append(y + second * plain.mlp(plain.norm2(y)) * plain.ls2)
    distance = torch.stack([(found - outcome).abs().amax(dim=(1, 2)) for outcome in outcomes])
    assert distance.amin(dim=0).max() < rounding_bound(
        terms_of(layer), torch.float32, float(found.abs().max())
    )
    assert set(distance.argmin(dim=0).tolist()) == {0, 1, 2, 3}


def test_gradient_checkpointing_keeps_gradients() -> None:
    plain = tower().train()
    saving = copy.deepcopy(plain)
    saving.gradient_checkpointing = True
    calls = []
    saving.encoder.layers[1].register_forward_pre_hook(lambda *_: calls.append(1))
    direction = torch.randn(2, 17, 24, generator=torch.Generator().manual_seed(4))
    outputs = [model(tiles()) for model in (plain, saving)]
    assert torch.equal(*outputs)
    for output in outputs:
        (output * direction).sum().backward()
    assert len(calls) == 2
    for (name, one), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name


def test_pixels_are_converted_to_the_dtype_of_the_tower() -> None:
    model = tower().to(torch.bfloat16)
    output = model(tiles())
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), tower()(tiles()), atol=0.2, rtol=0)
