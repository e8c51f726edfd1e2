"""Conversion of names, shapes and options between the reference's and transformers' formats."""

from pathlib import Path

import pytest
import torch
from model.conftest import CONTEXT, make_config, make_model
from transformers import InternVLConfig, InternVLForConditionalGeneration

from internvl_chat.model.io.hf_format import from_hf_config, from_hf_weights, to_hf_config, to_hf_weights
from internvl_chat.model.io.weights import Weights, read_weights, write_weights
from internvl_chat.utils.errors import ModelError

NAMES = {
    "vision_model.embeddings.class_embedding": "model.vision_tower.embeddings.cls_token",
    "vision_model.embeddings.position_embedding": "model.vision_tower.embeddings.position_embeddings",
    "vision_model.embeddings.patch_embedding.weight": (
        "model.vision_tower.embeddings.patch_embeddings.projection.weight"
    ),
    "vision_model.encoder.layers.1.ls1": "model.vision_tower.encoder.layer.1.lambda_1",
    "vision_model.encoder.layers.1.ls2": "model.vision_tower.encoder.layer.1.lambda_2",
    "vision_model.encoder.layers.12.attn.proj.bias": (
        "model.vision_tower.encoder.layer.12.attention.projection_layer.bias"
    ),
    "vision_model.encoder.layers.0.attn.q_norm.weight": (
        "model.vision_tower.encoder.layer.0.attention.q_norm.weight"
    ),
    "vision_model.encoder.layers.0.attn.k_norm.weight": (
        "model.vision_tower.encoder.layer.0.attention.k_norm.weight"
    ),
    "vision_model.encoder.layers.0.norm1.bias": "model.vision_tower.encoder.layer.0.layernorm_before.bias",
    "vision_model.encoder.layers.0.norm2.bias": "model.vision_tower.encoder.layer.0.layernorm_after.bias",
    "vision_model.encoder.layers.0.mlp.fc1.weight": "model.vision_tower.encoder.layer.0.mlp.fc1.weight",
    "mlp1.0.weight": "model.multi_modal_projector.layer_norm.weight",
    "mlp1.1.bias": "model.multi_modal_projector.linear_1.bias",
    "mlp1.3.weight": "model.multi_modal_projector.linear_2.weight",
    "language_model.model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
    "language_model.model.layers.0.self_attn.q_proj.bias": (
        "model.language_model.layers.0.self_attn.q_proj.bias"
    ),
    "language_model.model.layers.0.input_layernorm.weight": (
        "model.language_model.layers.0.input_layernorm.weight"
    ),
    "language_model.model.norm.weight": "model.language_model.norm.weight",
    "language_model.lm_head.weight": "lm_head.weight",
}

VARIANTS = {
    "as in InternVL3": {},
    "InternViT-6B's options": {
        "vision": {"qk_normalization": True, "norm_type": "rms_norm", "qkv_bias": False}
    },
    "layer, epsilon, activation": {
        "select_layer": -2,
        "vision": {"layer_norm_eps": 1e-5, "hidden_act": "gelu_pytorch_tanh"},
    },
    "tied head": {"llm": {"tie_word_embeddings": True}},
    "quarter resolution": {"downsample_ratio": 0.25},
}


def lazy(tensors: dict[str, torch.Tensor]) -> Weights:
    return {name: lambda t=tensor: t for name, tensor in tensors.items()}


def read(weights: Weights) -> dict[str, torch.Tensor]:
    return {name: function() for name, function in weights.items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("own", "theirs"), NAMES.items())
def test_names(own: str, theirs: str) -> None:
    weights = {own: lambda: torch.zeros(1)}
    assert to_hf_weights(weights).keys() == {theirs}
    assert from_hf_weights(to_hf_weights(weights)).keys() == {own}


def test_qkv_is_split() -> None:
    name = "vision_model.encoder.layers.3.attn.qkv"
    weight, bias = torch.arange(24.0).reshape(6, 4), torch.arange(6.0)
    theirs = read(to_hf_weights(lazy({f"{name}.weight": weight, f"{name}.bias": bias})))
    prefix = "model.vision_tower.encoder.layer.3.attention"
    expected = {}
    for number, letter in enumerate("qkv"):
        expected[f"{prefix}.{letter}_proj.weight"] = weight[2 * number : 2 * number + 2]
        expected[f"{prefix}.{letter}_proj.bias"] = bias[2 * number : 2 * number + 2]
    assert_same(theirs, expected)
    assert_same(read(from_hf_weights(lazy(theirs))), {f"{name}.weight": weight, f"{name}.bias": bias})


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_names_and_shapes_match_transformers(changes: dict) -> None:
    model = make_model(**changes)
    theirs = read(to_hf_weights(lazy(model.state_dict())))
    other = InternVLForConditionalGeneration._from_config(
        InternVLConfig(**to_hf_config(model.config, CONTEXT))
    )
    shapes = {name: tensor.shape for name, tensor in other.state_dict().items()}
    assert {name: tensor.shape for name, tensor in theirs.items()} == shapes
    assert_same(read(from_hf_weights(lazy(theirs))), dict(model.state_dict()))


def test_first_naming_scheme() -> None:
    model = make_model()
    first = {}
    for name, tensor in read(to_hf_weights(lazy(model.state_dict()))).items():
        if name.startswith("model.language_model."):
            name = "language_model.model." + name.removeprefix("model.language_model.")
        elif name.startswith("lm_head."):
            name = "language_model." + name
        else:
            name = name.removeprefix("model.")
        first[name] = tensor
    assert "vision_tower.embeddings.cls_token" in first and "language_model.lm_head.weight" in first
    assert_same(read(from_hf_weights(lazy(first))), dict(model.state_dict()))


def test_converted_weights_can_be_written(tmp_path: Path) -> None:
    """The three parts of a fused layer share memory, which not all writers support."""
    theirs = to_hf_weights(lazy(make_model().state_dict()))
    write_weights(theirs, tmp_path)
    assert_same(read(read_weights(tmp_path)), read(theirs))


@pytest.mark.parametrize("convert", [to_hf_weights, from_hf_weights])
def test_an_unknown_weight_is_reported(convert) -> None:
    with pytest.raises(ModelError, match=r"'audio_model\.weight'"):
        convert({"audio_model.weight": lambda: torch.zeros(1)})


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_configuration_round_trip(changes: dict) -> None:
    config = make_config(**changes)
    raw = to_hf_config(config, CONTEXT)
    back = from_hf_config(raw, source="config.json")
    vision = config.vision_config
    for name in (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "image_size",
        "patch_size",
        "num_channels",
        "qkv_bias",
        "qk_normalization",
        "norm_type",
        "layer_norm_eps",
        "hidden_act",
    ):
        assert getattr(back.vision_config, name) == getattr(vision, name), name
    for name in (
        "downsample_ratio",
        "ps_version",
        "select_layer",
        "image_size",
        "tokens_per_tile",
        "template",
    ):
        assert getattr(back, name) == getattr(config, name), name
    mine, theirs = config.build_llm_config().to_dict(), back.build_llm_config().to_dict()
    assert mine == theirs


def test_transformers_reads_the_configuration() -> None:
    config = make_config(select_layer=-2, llm={"tie_word_embeddings": False})
    theirs = InternVLConfig(**to_hf_config(config, CONTEXT))
    assert (theirs.image_token_id, theirs.image_seq_length) == (CONTEXT, 4)
    assert (theirs.vision_feature_layer, theirs.downsample_ratio) == (-2, 0.5)
    assert theirs.tie_word_embeddings is False and theirs.text_config.tie_word_embeddings is False
    assert list(theirs.vision_config.image_size) == [56, 56]
    assert theirs.text_config.model_type == "qwen2"
    # A configuration written by transformers itself is converted back to the original.
    back = from_hf_config(theirs.to_dict(), source="config.json")
    assert back.vision_config == from_hf_config(to_hf_config(config, CONTEXT), source="").vision_config
    assert (back.select_layer, back.tokens_per_tile) == (-2, 4)
    assert back.build_llm_config().to_dict() == config.build_llm_config().to_dict()


def test_pixel_shuffle_v1_is_rejected() -> None:
    with pytest.raises(ModelError, match="v2 only"):
        to_hf_config(make_config(ps_version="v1"), CONTEXT)


@pytest.mark.parametrize(("image_size", "patch_size"), [(448, 14), ([448, 448], [14, 14])])
def test_sizes_may_be_numbers_or_pairs(image_size: int | list[int], patch_size: int | list[int]) -> None:
    raw = to_hf_config(make_config(), CONTEXT)
    raw["vision_config"] |= {"image_size": image_size, "patch_size": patch_size}
    assert from_hf_config(raw, source="x").tokens_per_tile == 256


@pytest.mark.parametrize(
    ("name", "supported", "other"),
    [
        ("projector_hidden_act", "gelu", "relu"),
        ("projector_hidden_act", "gelu", "gelu_pytorch_tanh"),
        ("vision_feature_select_strategy", "default", "full"),
    ],
)
def test_other_projectors_are_rejected(name: str, supported: str, other: str) -> None:
    raw = to_hf_config(make_config(), CONTEXT)
    from_hf_config({**raw, name: supported}, source="x")
    with pytest.raises(ModelError, match=f"x: {name} is '{other}'; only '{supported}' is supported"):
        from_hf_config({**raw, name: other}, source="x")
