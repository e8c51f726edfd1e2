"""Batched decoding in which an answer does not depend on its batch.

A prompt runs through the model alone. After that, the newest token of each answer is a row of a matrix with a
fixed number of rows, and attention treats each row separately (see `cached_attention`). The result of a row
depends neither on the other rows nor on how many are in use, so an answer is the same, to the last bit,
whatever is answered beside it. When an answer ends, the next prompt takes its row.

Shapes: T tokens of a prompt, C width, W rows, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from internvl_chat.inference.cached_attention import DecodeStep, KVCache, Prefill, Slot, cached_attention
from internvl_chat.inference.sampling import Sampling

# Rows of a decoding step. A GPU spends its time reading the weights, however many rows there are.
_ROWS = {"cpu": 8, "cuda": 32}
# Most tokens of the KV cache: 57 kB each for InternVL3-8B.
_MAX_CACHED_TOKENS = 1 << 16


@dataclass
class _Answer:
    """An answer in progress.

    Attributes:
        index: index of its prompt.
        slot: its keys and values.
        remaining: tokens that it may still get.
        sample: chooses a token by its logits; None for the most likely one.
        token: the newest token.
    """

    index: int
    slot: Slot
    remaining: int
    sample: Callable[[torch.Tensor], int] | None
    token: int = -1


class Decoder:
    """Answers prompts with a language model.

    Args:
        language_model: a decoder of transformers with a head.
        end_id: the token that ends an answer.
        max_new_tokens: most tokens of an answer.
        sampling: None for greedy decoding.
    """

    def __init__(
        self, language_model: PreTrainedModel, *, end_id: int, max_new_tokens: int, sampling: Sampling | None
    ) -> None:
        self.language_model, self.end_id = language_model, end_id
        self.max_new_tokens, self.sampling = max_new_tokens, sampling
        self.embed_tokens = language_model.get_input_embeddings()

    @torch.no_grad()
    def run(self, prompts: Iterable[torch.Tensor]) -> Iterator[tuple[int, int | None]]:
        """Answer prompts, as many at a time as rows and memory allow.

        Args:
            prompts: embeddings (T, C) each; the next one is taken when it can start.

        Yields:
            The index of a prompt with the next token of its answer, or with None when the answer is complete.
        """
        waiting = enumerate(prompts)
        following = next(waiting, None)
        row_count = _ROWS.get(self.embed_tokens.weight.device.type, _ROWS["cuda"])
        rows: list[_Answer | None] = [None] * row_count
        cache = KVCache(row_count, _MAX_CACHED_TOKENS)
        while following is not None or any(rows):
            while following is not None and None in rows:
                slot = cache.reserve(len(following[1]) + self.max_new_tokens)
                if slot is None:
                    break
                row = rows.index(None)
                rows[row] = self._start(*following, slot)
                yield from self._emit(rows, row)
                following = next(waiting, None)
            if any(rows):
                self._step(rows)
            for row, answer in enumerate(rows):
                if answer is not None:
                    yield from self._emit(rows, row)

    def _start(self, index: int, embeddings: torch.Tensor, slot: Slot) -> _Answer:
        """Run a prompt through the model, and choose the first token of its answer."""
        sample = self.sampling.sampler(embeddings.device) if self.sampling else None
        answer = _Answer(index, slot, self.max_new_tokens, sample)
        positions = torch.arange(len(embeddings), device=embeddings.device).unsqueeze(0)
        self._choose([answer], self._logits(embeddings.unsqueeze(0), positions, Prefill(slot)))
        return answer

    def _step(self, rows: list[_Answer | None]) -> None:
        """Give each answer its next token."""
        tokens = [[self.end_id if answer is None else answer.token] for answer in rows]
        positions = [[0 if answer is None else answer.slot.length] for answer in rows]
        device = self.embed_tokens.weight.device
        embeddings = self.embed_tokens(torch.tensor(tokens, device=device))  # (W, 1, C)
        step = DecodeStep([None if answer is None else answer.slot for answer in rows])
        self._choose(rows, self._logits(embeddings, torch.tensor(positions, device=device), step))

    def _logits(
        self, embeddings: torch.Tensor, positions: torch.Tensor, kv_pass: Prefill | DecodeStep
    ) -> torch.Tensor:
        """Return the logits (W, V) after the last token of (W, T, C)."""
        with cached_attention(self.language_model):
            output = self.language_model(
                inputs_embeds=embeddings,
                position_ids=positions,
                use_cache=False,
                logits_to_keep=1,
                kv_pass=kv_pass,
            )
        for slot in kv_pass.slots:
            slot.length += embeddings.shape[1]
        return output.logits[:, -1].to(embeddings.device)

    def _choose(self, rows: list[_Answer | None], logits: torch.Tensor) -> None:
        """Set the newest token of each answer."""
        most_likely = logits.float().argmax(dim=-1).tolist()
        for row, answer in enumerate(rows):
            if answer is not None:
                answer.token = answer.sample(logits[row]) if answer.sample else most_likely[row]

    def _emit(self, rows: list[_Answer | None], row: int) -> Iterator[tuple[int, int | None]]:
        """Yield an answer's newest token; if it was the last, free its row and yield the end."""
        answer = rows[row]
        answer.remaining = 0 if answer.token == self.end_id else answer.remaining - 1
        if answer.token != self.end_id:
            yield answer.index, answer.token
        if not answer.remaining:
            rows[row] = None
            answer.slot.release()
            yield answer.index, None
