"""FLOPs match manual counts for small shapes and torch's own counter for a forward pass."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model.conftest import make_model, make_record, pack
from torch.utils.flop_counter import FlopCounterMode

from internvl_chat.model.flops import FlopCounter, count_flops, peak_flops
from internvl_chat.model.kernels.apply import apply_kernels
from internvl_chat.model.lora.injection import add_lora
from internvl_chat.model.tiny import TinyShape
from internvl_chat.train.freeze import set_trainable

SHAPES = {
    "grouped heads": TinyShape(
        56, vision_width=32, vision_layers=2, vision_heads=2, width=64, layers=2, heads=4, kv_heads=2
    ),
    "larger tiles": TinyShape(
        84, vision_width=48, vision_layers=3, vision_heads=4, width=48, layers=1, heads=4, kv_heads=1
    ),
}


def torch_counts(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_the_parts_by_hand() -> None:
    model = make_model()
    apply_kernels(model, torch.device("cpu"))
    counts = count_flops(model)
    # Layer of the language model: q and o 64 x 64, k and v 64 x 32, three matrices of 64 x 256.
    # Two layers; the MLP of the last one runs for supervised tokens only.
    assert counts.decoder == 2 * (2 * (2 * 64 * 64 + 2 * 64 * 32) + 3 * 64 * 256)
    assert counts.supervised == 2 * (64 * 64 + 3 * 64 * 256)
    assert counts.attention == 2 * (2 * 64 + 2 * 64)  # scores and values, all heads, two layers
    # Tower: 16 patches of 3 * 14 * 14 values, then 17 tokens through two blocks.
    linear = 4 * 32 * 32 + 2 * 32 * 128
    assert counts.tile == 2 * 16 * 588 * 32 + 2 * (2 * 17 * linear + 2 * 2 * 17 * 17 * 32)
    assert counts.projector == 4 * 2 * (128 * 64 + 64 * 64)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_tower_and_projector_match_the_counter_of_torch(shape: TinyShape) -> None:
    model = make_model(shape, attn="eager")
    counts = count_flops(model)
    tiles = torch.zeros(3, 3, shape.image_size, shape.image_size)
    with torch.no_grad():
        assert torch_counts(lambda: model.vision_model(tiles)) == 3 * counts.tile
        assert torch_counts(lambda: model.image_features(tiles)) == 3 * (counts.tile + counts.projector)


EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
LANGUAGE_MODELS = {
    "qwen2": {},
    "tied": {"tie_word_embeddings": True},
    "llama": {"model_type": "llama"},
    "qwen3": {"model_type": "qwen3", "head_dim": 24},
    "qwen3_moe": {"model_type": "qwen3_moe", "head_dim": 24, **EXPERTS},
}


@pytest.mark.parametrize("llm", LANGUAGE_MODELS.values(), ids=LANGUAGE_MODELS.keys())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("kernels", [False, True])
def test_the_language_model_matches_the_counter_of_torch(shape: TinyShape, llm: dict, kernels: bool) -> None:
    model = make_model(shape, attn="eager", llm=llm)
    # torch does not count the grouped products of the experts.
    model.language_model.set_experts_implementation("eager")
    if kernels:
        apply_kernels(model, torch.device("cpu"))
    model.vision_model.requires_grad_(False)
    counts, record = count_flops(model), make_record(text=12)
    tokens, supervised = len(record.input_ids), int((record.labels >= 0).sum())
    positions, rotary = torch.arange(tokens)[None], model.language_model.model.rotary_emb
    with torch.no_grad():
        # torch also counts the outer product that computes the rotary angles.
        angles = torch_counts(lambda: rotary(torch.zeros(1, tokens, 4), positions))
        found = torch_counts(lambda: model.language_model(input_ids=record.input_ids[None], use_cache=False))
        expected = (counts.decoder + counts.supervised) * tokens + counts.attention * tokens**2
        assert found - angles == expected
        found = torch_counts(lambda: model(**pack([record], labels=True)))
    # Eager attention also computes the masked half; `step` counts only the visible pairs.
    masked = counts.attention * tokens * (tokens - 1) / 2
    step = dataclasses.replace(counts, llm_passes=1).step([tokens], supervised, tiles=0)
    assert found - angles == step + masked


def test_a_step_adds_up_records_supervised_tokens_and_tiles() -> None:
    counts = FlopCounter(
        decoder=10.0,
        attention=3.0,
        supervised=7.0,
        tile=100.0,
        projector=20.0,
        llm_passes=3,
        vision_passes=1,
        projector_passes=2,
    )
    pairs = (1 + 2 + 3) + (1 + 2)
    assert (
        counts.step([3, 2], supervised=4, tiles=6) == 3 * (10 * 5 + 3 * pairs + 7 * 4) + 100 * 6 + 2 * 20 * 6
    )
    assert counts.step([3], 0, 0) + counts.step([2], 4, 6) == counts.step([3, 2], 4, 6)


@settings(max_examples=60)
@given(
    records=st.lists(
        st.tuples(st.integers(1, 200_000), st.integers(0, 5000), st.integers(0, 40)), min_size=1, max_size=20
    ),
    passes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
)
def test_records_match_single_steps(
    records: list[tuple[int, int, int]], passes: tuple[int, int, int]
) -> None:
    counts = FlopCounter(14e9, 4e5, 1.1e9, 7e11, 4e10, *passes)
    arrays = np.array(records, np.int32).T
    found = counts.records(*arrays)
    alone = [counts.step([tokens], supervised, tiles) for tokens, supervised, tiles in records]
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, alone, rtol=1e-14)
    together = counts.step([tokens for tokens, _, _ in records], *(int(a.sum()) for a in arrays[1:]))
    assert found.sum() == pytest.approx(together, rel=1e-12)


def test_many_records_by_hand() -> None:
    counts = FlopCounter(10.0, 3.0, 7.0, 100.0, 20.0, llm_passes=3, vision_passes=1, projector_passes=2)
    found = counts.records(np.array([3, 2]), np.array([0, 4]), np.array([0, 6]))
    assert found.tolist() == [3 * (10 * 3 + 3 * 6), 3 * (10 * 2 + 3 * 3 + 7 * 4) + 100 * 6 + 2 * 20 * 6]
    empty = np.zeros(0, np.int32)
    assert counts.records(empty, empty, empty).shape == (0,)


@pytest.mark.parametrize(
    ("flags", "rank", "passes"),
    [
        ({"freeze_backbone": True}, 0, (3, 1, 3)),  # the full recipe
        ({"freeze_llm": True, "freeze_mlp": True, "freeze_backbone": True}, 4, (2, 1, 1)),  # the LoRA recipe
        ({"freeze_llm": True, "freeze_backbone": True}, 4, (2, 1, 3)),
        ({"freeze_llm": True, "freeze_backbone": True}, 0, (2, 1, 3)),
        ({}, 0, (3, 3, 3)),
        ({"freeze_llm": True, "freeze_mlp": True}, 0, (2, 3, 2)),
        ({"freeze_llm": True, "freeze_mlp": True, "freeze_backbone": True}, 0, (1, 1, 1)),
    ],
)
def test_passes_of_trained_parts(flags: dict, rank: int, passes: tuple[int, int, int]) -> None:
    model = make_model()
    add_lora(model, llm_rank=rank)
    set_trainable(model, **flags)
    counts = count_flops(model)
    assert (counts.llm_passes, counts.vision_passes, counts.projector_passes) == passes


def test_adapters_are_not_counted() -> None:
    plain, adapted = make_model(), make_model()
    add_lora(adapted, llm_rank=8)
    set_trainable(adapted, freeze_mlp=True, freeze_backbone=True)
    names = ("decoder", "attention", "supervised", "tile", "projector")
    assert [getattr(count_flops(plain), n) for n in names] == [
        getattr(count_flops(adapted), n) for n in names
    ]


def test_larger_tiles_cost_more_after_resizing() -> None:
    model = make_model()
    model.vision_model.resize_positions(84)
    model.config.force_image_size = 84
    linear = 4 * 32 * 32 + 2 * 32 * 128
    counts = count_flops(model)
    assert counts.tile == 2 * 36 * 588 * 32 + 2 * (2 * 37 * linear + 2 * 2 * 37 * 37 * 32)
    assert counts.projector == 9 * 2 * (128 * 64 + 64 * 64)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peaks(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak
    assert peak_flops(torch.device("cpu")) is None
