"""Decoding speed with the pinned SDPA backend and with the backend that torch selects."""

import contextlib
import time
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.gpu.check import Check
from benchmarks.shapes import SHAPES, random_model
from internvl_chat.inference import cached_attention
from internvl_chat.inference.decoding import Decoder
from internvl_chat.model import attention

_MODELS = {"small": "smoke", "8b": "internvl3-8b"}
_BATCHES = {"small": (1, 4), "8b": (1, 8, 32)}
_PROMPT_TOKENS = {"small": 40, "8b": 600}
_NEW_TOKENS = {"small": 8, "8b": 48}


@torch.no_grad()
def decoding(check: Check) -> None:
    """Measure the decoding speed for each batch size, in tokens per second without the prefill."""
    device = torch.device(check.device)
    model = random_model(SHAPES[_MODELS[check.size]], 0, attn="sdpa", device=device).eval().language_model
    _rate(check, model, batch=1, new_tokens=2)  # warm-up
    parts = []
    for batch in _BATCHES[check.size]:
        rates = {}
        for name, context in (("pinned", contextlib.nullcontext()), ("unpinned", _unpinned())):
            with context:
                rates[name] = _rate(check, model, batch, _NEW_TOKENS[check.size])
        check.add(**{f"batch {batch}, tokens per second": rates})
        parts.append(f"{batch}: {rates['pinned']:.0f} ({rates['unpinned']:.0f} unpinned)")
    check.summary = f"tokens/s by batch: {', '.join(parts)}"


def _rate(check: Check, model: PreTrainedModel, batch: int, new_tokens: int) -> float:
    """Return the decoding speed of a batch in tokens per second, measured after each answer's first token."""
    decoder = Decoder(model, end_id=model.config.vocab_size - 1)
    tokens, began = 0, 0.0
    for _, token in decoder.run(_prompts(check, model, batch), max_new_tokens=new_tokens):
        tokens += token is not None
        if tokens == batch and not began:  # prefill done; reading a token synchronizes the device
            began = time.perf_counter()
    return (tokens - batch) / (time.perf_counter() - began)


def _prompts(check: Check, model: PreTrainedModel, batch: int) -> list[Tensor]:
    embedding = model.get_input_embeddings()
    device = embedding.weight.device
    generator = torch.Generator(device).manual_seed(0)
    shape = (batch, _PROMPT_TOKENS[check.size])
    return list(embedding(torch.randint(0, 1000, shape, device=device, generator=generator)))


@contextlib.contextmanager
def _unpinned() -> Iterator[None]:
    """Within the context, let torch select the SDPA backend."""
    with contextlib.ExitStack() as stack:
        for module in (attention, cached_attention):
            choose = mock.patch.object(module, "pinned_sdpa", lambda device: contextlib.nullcontext())
            stack.enter_context(choose)
        yield
