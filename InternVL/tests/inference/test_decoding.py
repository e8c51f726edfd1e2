"""Answers are bitwise independent of their batch, and the size of the cache is limited."""

from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_prompts
from inference.prompts import make_engine, mixed_prompts

from internvl_chat.inference import cached_attention, decoding
from internvl_chat.inference.decoding import Answer, Decoder
from internvl_chat.inference.devices import place
from internvl_chat.inference.engine import Engine, Prompt
from internvl_chat.inference.sampling import Sampling
from internvl_chat.model import attention
from internvl_chat.model.attention import pinned_sdpa

LENGTH = 10


class RecordingDecoder(Decoder):
    """Decoder that records the logits of each token and the number of answers in progress."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.numbers: dict[Answer, int] = {}
        self.logits: dict[int, list[torch.Tensor]] = {}
        self.busy: list[int] = []

    def _choose(self, rows, logits) -> None:
        for row, answer in enumerate(rows):
            if answer is not None:
                number = self.numbers.setdefault(answer, len(self.numbers))
                self.logits.setdefault(number, []).append(logits[row].clone())
        self.busy.append(sum(answer is not None for answer in rows))
        super()._choose(rows, logits)


def decode(engine: Engine, prompts: Iterable[Prompt], **options) -> tuple[list[list[int]], RecordingDecoder]:
    """Return the token ids of each answer, and the decoder with its records."""
    decoder = RecordingDecoder(engine.model.language_model, end_id=engine.end_id)
    answers: dict[int, list[int]] = {}
    inputs = (engine.embed(engine.encode(prompt), prompt.images) for prompt in prompts)
    for number, token in decoder.run(inputs, max_new_tokens=LENGTH, **options):
        answers.setdefault(number, []).extend([] if token is None else [token])
    return [answers[number] for number in sorted(answers)], decoder


def check_identity(engine: Engine, prompts: list[Prompt], **options) -> None:
    together, watched = decode(engine, prompts, **options)
    backwards, watched_backwards = decode(engine, prompts[::-1], **options)
    assert len({tuple(ids) for ids in together}) > len(prompts) // 5, (
        "the prompts must have different answers"
    )
    assert backwards[::-1] == together
    for number, prompt in enumerate(prompts):
        [ids], alone = decode(engine, [prompt], **options)
        assert ids == together[number]
        others = (watched.logits[number], watched_backwards.logits[len(prompts) - 1 - number])
        for other in others:
            assert len(alone.logits[0]) == len(other)
            assert all(map(torch.equal, alone.logits[0], other)), f"prompt {number}"


KINDS = {
    "qwen2": {},
    "qwen2 without grouped heads": {"llm": {"num_key_value_heads": 4}},
    "bfloat16": {},
    "sampled": {},
    "varlen": {"attn": "varlen"},
    "sliding window": {"llm": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}},
    "llama": {"llm": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_answers_do_not_depend_on_the_batch(kind):
    engine = make_engine(**KINDS[kind])
    if kind == "bfloat16":
        engine.model.bfloat16()
    options = {"sampling": Sampling(temperature=1.5, top_p=0.9, seed=3)} if kind == "sampled" else {}
    check_identity(engine, mixed_prompts(40), **options)


def test_real_records_of_the_small_reference_model(shared):
    engine = Engine.from_checkpoint(shared / "conformance/tiny", device="cpu", max_dynamic_patch=6)
    check_identity(engine, tiny_prompts(shared, engine, each=6))


@pytest.mark.parametrize("kind", ["qwen2", "sliding window", "llama"])
def test_logits_match_a_full_forward_pass(kind):
    engine = make_engine(**KINDS[kind])
    llm, words = engine.model.language_model, engine.model.language_model.get_input_embeddings()
    for prompt in mixed_prompts(5, seed=1):
        [ids], watched = decode(engine, [prompt])
        embeddings = engine.embed(engine.encode(prompt), prompt.images)
        with torch.no_grad():
            row = torch.cat([embeddings, words(torch.tensor(ids[:-1], dtype=torch.long))])[None]
            expected = llm(inputs_embeds=row, use_cache=False).logits[0, len(embeddings) - 1 :]
        torch.testing.assert_close(torch.stack(watched.logits[0])[: len(ids)], expected, atol=2e-5, rtol=1e-4)


def test_free_rows_are_reused():
    engine = make_engine()
    prompts = mixed_prompts(20)
    _, watched = decode(engine, prompts)
    steps = [busy for busy in watched.busy if busy > 1]
    assert max(steps) == 8 == decoding._ROWS["cpu"]
    # 20 answers of up to 10 tokens in 8 rows: without using rows again there would be 3 rounds.
    assert sum(busy == 8 for busy in steps) > LENGTH


def test_cache_is_bounded(monkeypatch):
    engine = make_engine()
    prompts = mixed_prompts(12)
    expected, _ = decode(engine, prompts)
    monkeypatch.setattr(decoding, "_MAX_CACHED_TOKENS", 3 * cached_attention._BLOCK)
    found, watched = decode(engine, prompts)
    assert found == expected
    assert max(watched.busy) == 3


def test_answers_join_and_leave_the_batch():
    """Answers with different options, some of which are removed, equal those of separate runs."""
    engine = make_engine()
    inputs = [engine.embed(engine.encode(prompt), prompt.images) for prompt in mixed_prompts(24)]
    options = [
        {"max_new_tokens": 1 + i % 7, "sampling": Sampling(1.5, seed=i) if i % 3 else None} for i in range(24)
    ]
    decoder, waiting, answers = engine.decoder(), list(range(24)), {}
    while waiting or any(decoder.rows):
        while waiting and (answer := decoder.add(inputs[waiting[0]], **options[waiting[0]])):
            answers[waiting.pop(0)] = answer
        assert not waiting or all(decoder.rows)
        decoder.step()
        for number in (5, 11):
            if number in answers and answers[number] in decoder.rows and len(answers[number].ids) == 3:
                decoder.remove(answers[number])
    assert [len(answers[number].ids) for number in (5, 11)] == [3, 3]
    for number, answer in answers.items():
        alone = engine.decoder().run([inputs[number]], **options[number])
        tokens = [token for _, token in alone if token is not None]
        assert answer.ids == (tokens[:3] if number in (5, 11) else tokens)
        assert answer.finish_reason == (None if number in (5, 11) else "length")
    assert decoder._cache.tokens == 0


def test_a_failed_prefill_leaves_the_batch_unchanged(monkeypatch):
    engine = make_engine()
    first, second = (engine.embed(engine.encode(prompt), prompt.images) for prompt in mixed_prompts(2))
    decoder = engine.decoder()
    expected = [token for _, token in decoder.run([first], max_new_tokens=5) if token is not None]
    answer = decoder.add(first, max_new_tokens=5)
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "_logits", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            decoder.add(second, max_new_tokens=5)
    assert sum(row is not None for row in decoder.rows) == 1
    while any(decoder.rows):
        decoder.step()
    assert answer.ids == expected


def test_prompts_are_read_lazily():
    engine = make_engine()
    taken, done = [], []

    def prompts():
        for number, prompt in enumerate(mixed_prompts(20)):
            taken.append(number)
            yield prompt

    for number, _ in engine.answer_each(prompts(), max_new_tokens=4):
        done.append(number)
        assert len(taken) - len(done) <= decoding._ROWS["cpu"] + 1
    assert sorted(done) == list(range(20))


def test_attention_implementation_is_restored():
    engine = make_engine()
    config = engine.model.language_model.config
    tokens = engine.stream(mixed_prompts(1)[0], max_new_tokens=4)
    next(tokens)
    assert config._attn_implementation == "sdpa"


def test_kernels_are_pinned(monkeypatch):
    """On a GPU, all answers share one call, and cuDNN is disabled in decoding and in prefill."""
    allowed, sdpa = [], F.scaled_dot_product_attention

    def watched(*args, **options):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return sdpa(*args, **options)

    engine, prompts = make_engine(), mixed_prompts(3)
    expected, _ = decode(engine, prompts)
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(cached_attention, "_ONE_CALL_PER_ANSWER", ())
    for module in (attention, cached_attention):
        monkeypatch.setattr(module, "pinned_sdpa", lambda device: pinned_sdpa(torch.device("cuda")))
    found, _ = decode(engine, prompts)
    assert found == expected
    assert allowed and not any(allowed)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_on_a_gpu_do_not_depend_on_the_batch(dtype):
    engine = make_engine()
    engine.model.to("cuda", dtype)
    check_identity(engine, mixed_prompts(40))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_a_model_distributed_over_gpus_gives_the_same_answers():
    prompts = mixed_prompts(12)
    whole, parts = make_engine(), make_engine()
    whole.model.to("cuda:0")
    parts.model = place(parts.model, "auto")
    found = parts.generate_ids(prompts, max_new_tokens=LENGTH)
    assert found == whole.generate_ids(prompts, max_new_tokens=LENGTH)
