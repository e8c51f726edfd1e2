"""Attention over packed records matches an explicit masked softmax; selection of the implementation."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_within_rounding, terms_of
from model.conftest import make_model, make_record, run_alone

from internvl_chat.constants import ATTENTION_NAMES
from internvl_chat.inference.tile_features import tile_features
from internvl_chat.model import attention
from internvl_chat.model.attention import (
    bidirectional_attention,
    pinned_sdpa,
    resolve_attention,
    varlen_attention,
)
from internvl_chat.model.kernels.cpu.blocked_attention import blocked_attention
from internvl_chat.utils.errors import ModelError, UsageError

CPU = torch.device("cpu")

SEGMENTS = {
    "one": [12],
    "several": [3, 5, 4],
    "single tokens": [1, 1, 1],
    "a single token among others": [4, 1, 6],
}


class Layer(torch.nn.Module):
    """Stand-in for the calling layer that transformers passes."""

    def __init__(self, is_causal: bool = True) -> None:
        super().__init__()
        self.is_causal = is_causal


def inputs(
    tokens: int, heads: int = 4, kv_heads: int = 2, features: int = 8, rows: int = 1, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    shapes = [(rows, h, tokens, features) for h in (heads, kv_heads, kv_heads)]
    return tuple(torch.randn(shape, generator=rng, requires_grad=True) for shape in shapes)


def masked_softmax(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: list[int],
    *,
    causal: bool = True,
    scaling: float | None = None,
) -> torch.Tensor:
    """Return float64 attention in which future tokens and other segments are masked."""
    q, k, v = (x.double() for x in (query, key, value))
    rows, heads, tokens, features = q.shape
    scaling = features**-0.5 if scaling is None else scaling
    segment = [number for number, length in enumerate(lengths) for _ in range(length)]
    assert len(segment) == tokens
    allowed = torch.tensor(
        [[segment[i] == segment[j] and (j <= i or not causal) for j in range(tokens)] for i in range(tokens)]
    )
    out = []
    for row in range(rows):
        for head in range(heads):
            shared = head // (heads // k.shape[1])
            scores = q[row, head] @ k[row, shared].T * scaling
            weights = torch.where(allowed, scores.exp(), 0.0)
            out.append(weights / weights.sum(dim=-1, keepdim=True) @ v[row, shared])
    return torch.stack(out).reshape(rows, heads, tokens, features)


def amplification(query: torch.Tensor, key: torch.Tensor, scaling: float | None) -> float:
    """Return how much the scores amplify rounding: a score's error is the relative error of its weight."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return 1 + float(query.norm(dim=-1).max() * key.norm(dim=-1).max()) * scaling


def assert_outputs(
    found: torch.Tensor,
    expected: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float | None = None,
) -> None:
    """Compare outputs up to rounding: a score is a sum over features, an output a sum over tokens."""
    magnitude = amplification(query, key, scaling) * float(expected.abs().max())
    assert_within_rounding(found, expected, query.shape[-1] + key.shape[2], magnitude=magnitude)


def assert_gradients(
    outputs: tuple[torch.Tensor, torch.Tensor],
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scaling: float | None = None,
) -> None:
    """Compare the gradients of two outputs up to rounding, with three times the tolerance of the outputs."""
    query, key, _ = qkv
    direction = torch.randn(outputs[1].shape, generator=torch.Generator().manual_seed(1))
    found, expected = (torch.autograd.grad((output * direction).sum(), qkv) for output in outputs)
    # The gradients of queries and keys are differences; with a single key they are zero.
    magnitude = amplification(query, key, scaling) * max(float(x.abs().max()) for x in expected)
    for one, other in zip(found, expected, strict=True):
        assert_within_rounding(one, other, 3 * (query.shape[-1] + key.shape[2]), magnitude=magnitude)


def bounds(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scaling", [None, 0.1, 1.0])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 2), (4, 1)])
@pytest.mark.parametrize("lengths", SEGMENTS.values(), ids=SEGMENTS.keys())
def test_packed_attention_and_its_gradients(
    lengths: list[int], heads: int, kv_heads: int, scaling: float | None, causal: bool
) -> None:
    qkv = inputs(sum(lengths), heads, kv_heads)
    found, weights = varlen_attention(
        Layer(causal),
        *qkv,
        None,
        scaling=scaling,
        cu_seq_lens_q=bounds(lengths),
        max_length_q=max(lengths),
    )
    expected = masked_softmax(*qkv, lengths, causal=causal, scaling=scaling)
    assert weights is None
    assert found.shape == (1, sum(lengths), heads, 8)
    assert_outputs(found.transpose(1, 2), expected, *qkv[:2], scaling)
    assert_gradients((found.transpose(1, 2), expected), qkv, scaling)


def test_is_causal_argument_overrides_the_layer() -> None:
    qkv = inputs(5)
    found, _ = varlen_attention(Layer(is_causal=True), *qkv, None, is_causal=False)
    expected = masked_softmax(*qkv, [5], causal=False)
    assert_outputs(found.transpose(1, 2), expected, *qkv[:2])


def test_without_bounds_each_row_is_one_segment() -> None:
    qkv = inputs(6, rows=3)
    found, _ = varlen_attention(Layer(), *qkv, None)
    assert_outputs(found.transpose(1, 2), masked_softmax(*qkv, [6]), *qkv[:2])


def test_future_and_other_records_are_masked() -> None:
    lengths = [3, 4]
    qkv = inputs(7)
    options = {"cu_seq_lens_q": bounds(lengths), "max_length_q": 4}
    before, _ = varlen_attention(Layer(), *qkv, None, **options)
    changed = [x.detach().clone() for x in qkv]
    for x in changed:
        x[:, :, 5:] = 9.0
    after, _ = varlen_attention(Layer(), *changed, None, **options)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_masks_and_caches_are_rejected() -> None:
    query, key, value = inputs(4)
    with pytest.raises(ValueError, match=r"neither padding masks nor a KV cache.*attn='sdpa'"):
        varlen_attention(Layer(), query, key, value, torch.ones(1, 1, 4, 4))
    with pytest.raises(ValueError, match="neither padding masks nor a KV cache"):
        varlen_attention(Layer(), query[:, :, -1:], key, value, None)


@pytest.mark.parametrize(
    ("asked", "used"), [("auto", "varlen"), ("varlen", "varlen"), ("sdpa", "sdpa"), ("eager", "eager")]
)
def test_resolve_attention_on_a_cpu(asked: str, used: str) -> None:
    assert resolve_attention(asked, CPU) == used


def test_flash_attention_is_rejected_on_a_cpu() -> None:
    with pytest.raises(UsageError) as caught:
        resolve_attention("flash_attention_2", CPU)
    message = str(caught.value)
    assert "--attn flash_attention_2" in message
    assert "NVIDIA GPU" in message and "cpu" in message
    assert "--attn auto" in message


def test_unknown_attention_lists_the_known_ones() -> None:
    with pytest.raises(UsageError) as caught:
        resolve_attention("flash", CPU)
    assert "'flash'" in str(caught.value)
    assert all(name in str(caught.value) for name in ATTENTION_NAMES)


@pytest.mark.parametrize(
    ("installed", "capability", "auto", "obstacle"),
    [
        (False, (9, 0), "varlen", "pip install"),
        (True, (7, 5), "varlen", "compute capability 8.0 or higher, but this GPU has 7.5"),
        (True, (8, 0), "flash_attention_2", None),
        (True, (9, 0), "flash_attention_2", None),
    ],
)
def test_resolve_attention_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
    installed: bool,
    capability: tuple[int, int],
    auto: str,
    obstacle: str | None,
) -> None:
    monkeypatch.setattr(attention, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = torch.device("cuda")
    assert resolve_attention("auto", gpu) == auto
    if obstacle is None:
        assert resolve_attention("flash_attention_2", gpu) == "flash_attention_2"
        return
    with pytest.raises(UsageError) as caught:
        resolve_attention("flash_attention_2", gpu)
    assert obstacle in str(caught.value)


@pytest.mark.parametrize("name", ["eager", "sdpa", "varlen"])
def test_bidirectional_attention(name: str) -> None:
    qkv = inputs(7, heads=3, kv_heads=3, rows=2)
    found = bidirectional_attention(*qkv, name=name)
    expected = masked_softmax(*qkv, [7], causal=False)
    assert_outputs(found, expected, *qkv[:2])
    assert_gradients((found, expected), qkv)


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_attention_dropout_keeps_the_mean(name: str) -> None:
    # If all values are 1, an output is the sum of its weights: 0, 2, 4, ... over 4 at rate 1/2.
    zeros, ones = torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
    torch.manual_seed(0)
    draws = torch.stack([bidirectional_attention(zeros, zeros, ones, name, dropout=0.5) for _ in range(200)])
    assert set(draws.flatten().tolist()) == {0.0, 0.5, 1.0, 1.5, 2.0}
    assert draws[..., 0].mean().item() == pytest.approx(1.0, abs=0.1)


def test_cudnn_is_excluded_on_a_gpu_only() -> None:
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    before = enabled()
    with pinned_sdpa(CPU):
        assert enabled() == before
    with pinned_sdpa(torch.device("cuda")):
        assert not enabled() and torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.mem_efficient_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()
    assert enabled() == before


@pytest.fixture
def cudnn_allowed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Pin kernels on the CPU as on a GPU; list that records whether cuDNN was enabled in each SDPA call."""
    calls: list[bool] = []
    sdpa = F.scaled_dot_product_attention

    def watched(*args: Any, **options: Any) -> torch.Tensor:
        calls.append(torch.backends.cuda.cudnn_sdp_enabled())
        return sdpa(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(attention, "pinned_sdpa", lambda device: pinned_sdpa(torch.device("cuda")))
    return calls


def test_kernels_are_pinned_in_training(cudnn_allowed: list[bool]) -> None:
    """Covers both towers with activation checkpointing, which recomputes attention in the backward pass."""
    model = make_model(attn="varlen")
    model.checkpoint_layers(1)
    record = make_record((2,))
    run_alone(model.train(), record).float().square().mean().backward()
    vision, llm = len(model.vision_model.encoder.layers), len(model.language_model.get_decoder().layers)
    assert len(cudnn_allowed) == 2 * vision + llm + 1 and not any(cudnn_allowed)


def test_kernels_are_pinned_in_a_frozen_tower(cudnn_allowed: list[bool]) -> None:
    tile_features(make_model(), torch.zeros(3, 56, 56, 3, dtype=torch.uint8), "imagenet")
    assert cudnn_allowed == [False, False]


def test_pinned_attention_compiles_into_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "pinned_sdpa", lambda device: pinned_sdpa(torch.device("cuda")))
    qkv = inputs(7, heads=3, kv_heads=3, rows=2)
    compiled = torch.compile(bidirectional_attention, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*qkv, name="sdpa"), bidirectional_attention(*qkv, name="sdpa"))


@pytest.mark.parametrize("window", [1, 3, 100])
@pytest.mark.parametrize("lengths", [None, [5, 9, 1]])
def test_sliding_window(window: int, lengths: list[int] | None) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 15, 8, generator=generator) for _ in range(3))
    bounds = None if lengths is None else torch.tensor([0, 5, 14, 15], dtype=torch.int32)
    out, _ = varlen_attention(
        Layer(), query, key, value, None, cu_seq_lens_q=bounds, max_length_q=9, sliding_window=window
    )
    owner = torch.zeros(15) if lengths is None else torch.tensor([0] * 5 + [1] * 9 + [2])
    for i in range(15):
        seen = [j for j in range(15) if owner[j] == owner[i] and 0 <= i - j < window]
        scores = (query[:, :, i : i + 1] * key[:, :, seen]).sum(-1) / 8**0.5
        expected = (scores.softmax(-1).unsqueeze(-1) * value[:, :, seen]).sum(2)
        assert_outputs(out[:, i], expected, query, key)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("length", [1, 5, 127, 128, 129, 400])
def test_blocked_attention_matches_torch(length: int, heads: int, kv_heads: int) -> None:
    """Covers lengths of exactly one block (128 queries), a partial block, and multiple blocks."""
    for scaling in (None, 0.3):
        qkv = inputs(length, heads, kv_heads)
        found = blocked_attention(*qkv, [length], scaling)
        expected = F.scaled_dot_product_attention(*qkv, is_causal=True, scale=scaling, enable_gqa=True)
        assert found.shape == expected.shape
        assert_outputs(found, expected, *qkv[:2], scaling)
        assert_gradients((found, expected), qkv, scaling)


def count_blocked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """List that records the length of each segment processed by blocked attention."""
    calls: list[int] = []

    def counted(*args: Any) -> torch.Tensor:
        calls.extend(args[3])
        return blocked_attention(*args)

    monkeypatch.setattr(attention, "blocked_attention", counted)
    return calls


@pytest.mark.parametrize("lengths", [[300], [130, 5, 1, 260]])
def test_bfloat16_accuracy_on_a_cpu(monkeypatch: pytest.MonkeyPatch, lengths: list[int]) -> None:
    """Errors are at most a few bfloat16 roundings of 2^-8 each."""
    blocked = count_blocked(monkeypatch)
    exact = inputs(sum(lengths), heads=6, kv_heads=2, features=32)
    qkv = [x.detach().bfloat16().requires_grad_() for x in exact]
    exact = [x.detach().double().requires_grad_() for x in qkv]
    found, _ = varlen_attention(Layer(), *qkv, None, cu_seq_lens_q=bounds(lengths), max_length_q=max(lengths))
    assert blocked == lengths
    parts = zip(*(x.split(lengths, dim=2) for x in exact), strict=True)
    expected = torch.cat(
        [F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True) for part in parts], dim=2
    )
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    mine = torch.autograd.grad((found.transpose(1, 2) * direction).sum(), qkv)
    theirs = torch.autograd.grad((expected * direction.double()).sum(), exact)
    pairs = [(found.transpose(1, 2), expected), *zip(mine, theirs, strict=True)]
    for one, other in pairs:
        assert one.dtype == torch.bfloat16
        off = (one.double() - other).square().mean().sqrt() / other.square().mean().sqrt()
        assert off < 2**-7
        assert (one.double() - other).abs().max() < 2**-5 * other.abs().max()


@pytest.mark.parametrize("changed", range(4))
def test_blocked_attention_isolates_records(monkeypatch: pytest.MonkeyPatch, changed: int) -> None:
    lengths = [130, 5, 1, 260]
    blocked = count_blocked(monkeypatch)
    qkv = [x.detach().bfloat16().requires_grad_() for x in inputs(sum(lengths), features=16)]
    other = [x.detach().clone() for x in qkv]
    for x in other:
        x.split(lengths, dim=2)[changed].mul_(-3).add_(1)
    results = []
    for tensors in (qkv, [x.requires_grad_() for x in other]):
        out, _ = varlen_attention(Layer(), *tensors, None, cu_seq_lens_q=bounds(lengths), max_length_q=260)
        gradients = torch.autograd.grad(out.float().square().sum(), tensors)
        results.append([out.transpose(1, 2), *gradients])
    assert blocked == 2 * lengths
    for before, after in zip(*results, strict=True):
        for number, (one, two) in enumerate(
            zip(before.split(lengths, dim=2), after.split(lengths, dim=2), strict=True)
        ):
            # The attention weight of a single token is 1, regardless of its query and key.
            assert torch.equal(one, two) == (number != changed) or not (one.any() or two.any())


@pytest.mark.parametrize("position", [1, 127, 128, 250])
def test_blocked_attention_is_causal(position: int) -> None:
    qkv = [x.detach().bfloat16() for x in inputs(260, features=16)]
    before = blocked_attention(*qkv, [260])
    for x in qkv:
        x[:, :, position:] = 7.0
    after = blocked_attention(*qkv, [260])
    assert torch.equal(before[:, :, :position], after[:, :, :position])
    assert not torch.equal(before[:, :, position:], after[:, :, position:])


@pytest.mark.parametrize("option", [{"softcap": 30.0}, {"s_aux": torch.zeros(2)}])
def test_unsupported_options_are_rejected(option: dict) -> None:
    query, key, value = inputs(4)
    with pytest.raises(ModelError, match="use --attn eager"):
        varlen_attention(Layer(), query, key, value, None, **option)


@pytest.mark.parametrize("attn", ["varlen", "sdpa"])
def test_language_model_with_a_sliding_window(attn: str) -> None:
    llm = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
    record = make_record((2,))
    found, expected = (run_alone(make_model(attn=name, llm=llm), record) for name in (attn, "eager"))
    assert_within_rounding(found, expected, terms_of(make_model()))
    whole = run_alone(make_model(attn="eager"), record)
    assert (whole - expected).abs().max() > 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs an NVIDIA GPU: the flash kernel inside torch"
)
@pytest.mark.parametrize("window", [None, 7])
def test_flash_kernel_matches_sdpa(window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 4, 40, 64), (1, 2, 40, 64), (1, 2, 40, 64))
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    bounds = torch.tensor([0, 13, 14, 40], dtype=torch.int32)
    options = {"max_length_q": 26, "sliding_window": window}
    results = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        qkv = [t.to(device, dtype).requires_grad_() for t in tensors]
        out, _ = varlen_attention(Layer(), *qkv, None, cu_seq_lens_q=bounds.to(device), **options)
        out.float().square().sum().backward()
        results.append([out.float().cpu(), *(t.grad.float().cpu() for t in qkv)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=0.1, rtol=0.05)
