"""Cached attention is exact, bitwise independent of other answers, and limited in memory."""

import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import rounding_bound

from internvl_chat.inference import cached_attention
from internvl_chat.inference.cached_attention import _BLOCK, DecodeStep, KVCache, Prefill, Slot, _attend

LAYER = SimpleNamespace(layer_idx=0, is_causal=True)
ROWS = 8
FEATURES = 16


class Conversation:
    """Random queries, keys and values of one answer, determined by a seed."""

    device = torch.device("cpu")

    def __init__(
        self, seed: int, prompt: int, new: int, heads: int, kv_heads: int, dtype: torch.dtype
    ) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.prompt, self.new = prompt, new
        shapes = ((heads, FEATURES), (kv_heads, FEATURES), (kv_heads, FEATURES))
        self.qkv = [
            torch.randn(prompt + new, *shape, generator=rng).to(self.device, dtype) for shape in shapes
        ]
        self.outputs: list[torch.Tensor] = []
        self.slot: Slot | None = None

    def tokens(self, start: int, count: int = 1) -> list[torch.Tensor]:
        """Return queries, keys and values of some tokens, (heads, count, D) each."""
        return [x[start : start + count].transpose(0, 1) for x in self.qkv]

    def expected(self, token: int, window: int | None) -> torch.Tensor:
        """Return the expected output of a token, (H, D), in float64."""
        first = 0 if window is None else max(0, token + 1 - window)
        query, key, value = (x.double().transpose(0, 1) for x in self.qkv)
        return F.scaled_dot_product_attention(
            query[None, :, token : token + 1],
            key[None, :, first : token + 1],
            value[None, :, first : token + 1],
            enable_gqa=True,
        )[0, :, 0]


def decode(conversations: list[Conversation], window: int | None, cache: KVCache | None = None) -> None:
    """Decode conversations that start one after the other, as soon as rows and memory allow."""
    cache = cache or KVCache(ROWS, 1 << 16)
    waiting, rows = list(conversations), [None] * ROWS
    while waiting or any(rows):
        while waiting and None in rows:
            slot = cache.reserve(waiting[0].prompt + waiting[0].new)
            if slot is None:
                break
            row = rows.index(None)
            rows[row] = started = waiting.pop(0)
            started.slot = slot
            qkv = (x[None] for x in started.tokens(0, started.prompt))
            _attend(LAYER, *qkv, None, kv_pass=Prefill(slot), sliding_window=window)
            slot.length = started.prompt
        step(rows, window)
        for row, conversation in enumerate(rows):
            if conversation and len(conversation.outputs) == conversation.new:
                conversation.slot.release()
                rows[row] = None


def step(rows: list[Conversation | None], window: int | None) -> None:
    like = next(filter(None, rows))
    # The tokens of an empty row must be ignored.
    batch = [x[:1].transpose(0, 1).unsqueeze(0).repeat(ROWS, 1, 1, 1) for x in like.qkv]
    for row, conversation in enumerate(rows):
        if conversation:
            for x, token in zip(batch, conversation.tokens(conversation.slot.length), strict=True):
                x[row] = token
    kv_step = DecodeStep([conversation and conversation.slot for conversation in rows])
    out, _ = _attend(LAYER, *batch, None, kv_pass=kv_step, sliding_window=window)
    assert out.shape == (ROWS, 1, batch[0].shape[1], FEATURES) and out.dtype == batch[0].dtype
    for row, conversation in enumerate(rows):
        if conversation:
            conversation.outputs.append(out[row, 0])
            conversation.slot.length += 1
        else:
            assert not out[row].any()


HEADS = {"grouped": (6, 2), "one key head": (4, 1), "not grouped": (2, 2), "one head": (1, 1)}


def check_independence(heads: tuple[int, int], dtype: torch.dtype, window: int | None) -> None:
    """Decode prompts of 1 to 2100 tokens: within, at the end of and across blocks, and in multiple banks."""
    rng = random.Random(0)
    prompts = [1, 2, 500, 511, 512, 513, 1023, 1100, 2100, *(rng.randint(1, 1500) for _ in range(5))]
    sizes = [(seed, prompt, rng.randint(1, 8), *heads) for seed, prompt in enumerate(prompts)]
    together = [Conversation(*size, dtype) for size in sizes]
    decode(together, window)
    backwards = [Conversation(*size, dtype) for size in sizes]
    decode(backwards[::-1], window)
    for size, one, other in zip(sizes, together, backwards, strict=True):
        alone = Conversation(*size, dtype)
        decode([alone], window)
        for outputs in zip(alone.outputs, one.outputs, other.outputs, strict=True):
            assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2]), size


@pytest.fixture(params=["one call per answer", "one call per answer, two threads", "one call for all"])
def calls(request, monkeypatch):
    """Run with both call patterns; the joint call of GPUs is bitwise exact on a CPU only with one thread."""
    if request.param == "one call for all":
        monkeypatch.setattr(cached_attention, "_ONE_CALL_PER_ANSWER", ())
    if "two threads" in request.param:
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        yield
        torch.set_num_threads(before)
    else:
        yield


@pytest.mark.parametrize("window", [None, 20, 700])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("calls")
def test_other_answers_have_no_effect(heads, dtype, window) -> None:
    check_independence(HEADS[heads], dtype, window)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("window", [None, 20, 700])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_answers_have_no_effect_on_a_gpu(monkeypatch, heads, dtype, window) -> None:
    monkeypatch.setattr(Conversation, "device", torch.device("cuda"))
    check_independence(HEADS[heads], dtype, window)


@pytest.mark.parametrize("window", [None, 20, 700])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.usefixtures("calls")
def test_outputs_match_float64_attention(heads, window) -> None:
    conversations = [Conversation(seed, 200 * seed + 1, 3, *HEADS[heads], torch.float32) for seed in range(7)]
    decode(conversations, window)
    for conversation in conversations:
        for number, output in enumerate(conversation.outputs):
            expected = conversation.expected(conversation.prompt + number, window)
            bound = rounding_bound(conversation.prompt + FEATURES, torch.float32, expected.abs().max().item())
            torch.testing.assert_close(output.double(), expected, atol=bound, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("calls")
def test_non_finite_answers_do_not_contaminate_their_slot(dtype) -> None:
    def make() -> list[Conversation]:
        return [Conversation(seed, 40, 4, 4, 2, dtype) for seed in range(3)]

    clean, found = make(), make()
    decode(clean, None)
    cache = KVCache(ROWS, 1 << 16)
    broken = [Conversation(seed, 400, 4, 4, 2, dtype) for seed in range(3)]
    for conversation in broken:
        for x in conversation.qkv[1:]:
            x.fill_(torch.nan)
    decode(broken, None, cache)
    assert broken[0].outputs[0].isnan().all()
    decode(found, None, cache)
    for a, b in zip(clean, found, strict=True):
        assert all(map(torch.equal, a.outputs, b.outputs))


def test_memory_is_bounded() -> None:
    cache = KVCache(ROWS, 8 * _BLOCK)
    short = [cache.reserve(_BLOCK) for _ in range(3)]
    assert [slot.index for slot in short] == [0, 1, 2] and cache.tokens == 4 * _BLOCK  # slots have doubled
    assert cache.reserve(8 * _BLOCK) is None
    long = [cache.reserve(tokens) for tokens in (_BLOCK + 1, 2 * _BLOCK)]
    assert [slot.bank.capacity for slot in long] == 2 * [2 * _BLOCK] and cache.tokens == 8 * _BLOCK
    assert cache.reserve(2 * _BLOCK) is None
    assert cache.reserve(_BLOCK).index == 3 and cache.reserve(_BLOCK) is None
    assert cache.tokens == 8 * _BLOCK


def test_free_slots_are_reused_and_empty_banks_deleted() -> None:
    cache = KVCache(ROWS, 8 * _BLOCK)
    slots = [cache.reserve(_BLOCK) for _ in range(ROWS)]
    assert cache.reserve(_BLOCK) is None
    slots[5].release()
    slots[5] = cache.reserve(_BLOCK)
    assert slots[5].index == 5
    for slot in slots:
        slot.release()
    assert cache.reserve(4 * _BLOCK).bank.capacity == 4 * _BLOCK
    assert cache.tokens == 4 * _BLOCK


def test_single_answer_may_exceed_the_bound() -> None:
    cache = KVCache(ROWS, 2 * _BLOCK)
    slot = cache.reserve(20 * _BLOCK)
    assert slot.bank.capacity == 32 * _BLOCK
    assert cache.reserve(1) is None
    slot.release()
    assert cache.reserve(1) is not None and cache.tokens == _BLOCK
