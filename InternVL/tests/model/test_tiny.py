"""The tiny model depends only on its seed, has the requested shape, and is complete on disk."""

import json
from pathlib import Path

import pytest
import torch
from model.conftest import CONTEXT, SHAPE, VOCABULARY, make_record, pack, run_alone

from internvl_chat.model.io.checkpoint import load_model
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel
from internvl_chat.model.tiny import TinyShape, build_tiny_model, save_tiny_model, tiny_config


def build(seed: int = 0, shape: TinyShape = SHAPE) -> InternVLChatModel:
    return build_tiny_model(shape, vocab_size=VOCABULARY, image_context_id=CONTEXT, seed=seed)


def test_seed_determines_every_weight() -> None:
    torch.manual_seed(1)
    one = build(seed=3).state_dict()
    torch.manual_seed(2)
    same, other = build(seed=3).state_dict(), build(seed=4).state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    differing = {name for name in one if not torch.equal(one[name], other[name])}
    assert {
        "language_model.lm_head.weight",
        "mlp1.1.weight",
        "vision_model.embeddings.class_embedding",
    } <= differing


def test_global_random_state_is_unchanged() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    build(seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.initial_seed() == 5


@pytest.mark.parametrize(
    "shape",
    [
        SHAPE,
        TinyShape(
            image_size=84,
            vision_width=48,
            vision_layers=1,
            vision_heads=3,
            width=96,
            layers=3,
            heads=6,
            kv_heads=3,
        ),
        TinyShape(),
    ],
)
def test_shape(shape: TinyShape) -> None:
    model = build(shape=shape)
    grid = shape.image_size // 14
    vision, llm = model.vision_model, model.language_model.model
    assert vision.embeddings.position_embedding.shape == (1, 1 + grid**2, shape.vision_width)
    assert len(vision.encoder.layers) == shape.vision_layers
    assert vision.encoder.layers[0].attn.num_heads == shape.vision_heads
    assert vision.encoder.layers[0].mlp.fc1.weight.shape == (4 * shape.vision_width, shape.vision_width)
    assert llm.embed_tokens.weight.shape == (VOCABULARY, shape.width)
    assert len(llm.layers) == shape.layers
    size = shape.width // shape.heads
    assert llm.layers[0].self_attn.q_proj.weight.shape == (shape.heads * size, shape.width)
    assert llm.layers[0].self_attn.k_proj.weight.shape == (shape.kv_heads * size, shape.width)
    assert model.mlp1[1].weight.shape == (shape.width, 4 * shape.vision_width)
    assert model.config.tokens_per_tile == (grid // 2) ** 2
    assert model.language_model.lm_head.weight is not llm.embed_tokens.weight


def test_internvl3_options() -> None:
    config = tiny_config(SHAPE, VOCABULARY)
    assert (config.ps_version, config.downsample_ratio, config.select_layer) == ("v2", 0.5, -1)
    assert (config.template, config.use_thumbnail, config.dynamic_image_size) == ("internvl2_5", True, True)
    vision = config.vision_config
    assert (vision.norm_type, vision.qkv_bias, vision.qk_normalization) == ("layer_norm", True, False)
    llm = config.build_llm_config()
    assert (llm.model_type, llm.rms_norm_eps, llm.tie_word_embeddings) == ("qwen2", 1e-6, False)
    assert llm.rope_parameters["rope_theta"] == 1e6


def test_the_image_reaches_the_answer() -> None:
    """The untrained tower must preserve differences between images."""
    model, record = build().eval(), make_record((1,))
    other = {**pack([record]), "pixel_values": -record.pixel_values}
    logits, changed = run_alone(model, record), model(**other).logits[0]
    assert (logits - changed)[6:].abs().max() > 1e-3
    assert model.vision_model.embeddings.position_embedding.std() < 0.05


def test_initial_loss_is_uniform_and_decreases() -> None:
    model, inputs = build(), pack([make_record((1,)), make_record(seed=1)], labels=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(torch.tensor(float(VOCABULARY)).log().item(), abs=0.3)
    assert losses[-1] < losses[0] / 4


def test_the_folder_is_complete(tmp_path: Path) -> None:
    model, record = build().eval(), make_record((1,))
    save_tiny_model(model, tmp_path / "tiny", eos_token_id=3, pad_token_id=2)
    assert {file.name for file in (tmp_path / "tiny").iterdir()} == {
        "config.json",
        "model.safetensors",
        "generation_config.json",
    }
    generation = json.loads((tmp_path / "tiny/generation_config.json").read_text())
    assert generation == {"eos_token_id": 3, "pad_token_id": 2}
    loaded = load_model(tmp_path / "tiny", image_context_id=CONTEXT).eval()
    assert torch.equal(run_alone(loaded, record), run_alone(model, record))
