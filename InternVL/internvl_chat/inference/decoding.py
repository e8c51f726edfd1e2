"""Batched decoding in which answers are bitwise independent of the other answers in the batch.

Prompts are prefilled one at a time. A decoding step has a fixed number of rows, one for the newest token of
each answer. Attention handles each row separately (see `cached_attention`), so a row does not depend on the
others or on their number. When an answer ends, its row is reused for the next prompt.

Shapes: T tokens of a prompt, C hidden size, W rows, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from internvl_chat.inference.cached_attention import DecodeStep, KVCache, Prefill, Slot, cached_attention
from internvl_chat.inference.sampling import Sampling

# Number of rows per decoding step. On a GPU, a step with this many rows still spends most of its time reading
# the weights.
_ROWS = {"cpu": 8, "cuda": 32}
# Maximum number of tokens in the KV cache; a token takes 57 kB with InternVL3-8B.
_MAX_CACHED_TOKENS = 1 << 16


@dataclass
class _Answer:
    """Answer in progress.

    Attributes:
        remaining: maximum number of tokens still to generate.
        sample: function that samples a token from logits; None for greedy decoding.
    """

    index: int
    slot: Slot
    remaining: int
    sample: Callable[[torch.Tensor], int] | None
    token: int = -1


class Decoder:
    """Decodes answers to prompts with a language model.

    Args:
        end_id: id of the token that ends an answer.
        sampling: sampling options; None for greedy decoding.
    """

    def __init__(
        self, language_model: PreTrainedModel, *, end_id: int, max_new_tokens: int, sampling: Sampling | None
    ) -> None:
        self.language_model, self.end_id = language_model, end_id
        self.max_new_tokens, self.sampling = max_new_tokens, sampling
        self.embed_tokens = language_model.get_input_embeddings()
        self.device = self.embed_tokens.get_parameter("weight").device

    @torch.no_grad()
    def run(self, prompts: Iterable[torch.Tensor]) -> Iterator[tuple[int, int | None]]:
        """Decode an answer to each prompt, as many in parallel as fit in the rows and the KV cache.

        Args:
            prompts: embeddings (T, C) of each prompt; consumed lazily, one prompt ahead.

        Yields:
            (prompt index, next token); the token is None when the answer is complete.
        """
        waiting = enumerate(prompts)
        upcoming = next(waiting, None)
        row_count = _ROWS.get(self.device.type, _ROWS["cuda"])
        rows: list[_Answer | None] = [None] * row_count
        cache = KVCache(row_count, _MAX_CACHED_TOKENS)
        while upcoming is not None or any(rows):
            while upcoming is not None and None in rows:
                slot = cache.reserve(len(upcoming[1]) + self.max_new_tokens)
                if slot is None:
                    break
                row = rows.index(None)
                rows[row] = answer = self._start(*upcoming, slot)
                yield from self._emit(rows, row, answer)
                upcoming = next(waiting, None)
            if any(rows):
                self._step(rows)
            for row, active in enumerate(rows):
                if active is not None:
                    yield from self._emit(rows, row, active)

    def _start(self, index: int, embeddings: torch.Tensor, slot: Slot) -> _Answer:
        """Prefill a prompt and choose the first token of its answer."""
        sample = self.sampling.sampler(embeddings.device) if self.sampling else None
        answer = _Answer(index, slot, self.max_new_tokens, sample)
        positions = torch.arange(len(embeddings), device=embeddings.device).unsqueeze(0)
        self._choose([answer], self._logits(embeddings.unsqueeze(0), positions, Prefill(slot)))
        return answer

    def _step(self, rows: list[_Answer | None]) -> None:
        """Decode the next token of each answer."""
        tokens = [[self.end_id if answer is None else answer.token] for answer in rows]
        positions = [[0 if answer is None else answer.slot.length] for answer in rows]
        embeddings = self.embed_tokens(torch.tensor(tokens, device=self.device))  # (W, 1, C)
        step = DecodeStep([None if answer is None else answer.slot for answer in rows])
        self._choose(rows, self._logits(embeddings, torch.tensor(positions, device=self.device), step))

    def _logits(
        self, embeddings: torch.Tensor, positions: torch.Tensor, kv_pass: Prefill | DecodeStep
    ) -> torch.Tensor:
        """Run the language model on embeddings (W, T, C); return the logits (W, V) at the last position."""
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

    def _choose(self, rows: Sequence[_Answer | None], logits: torch.Tensor) -> None:
        """Choose the next token of each answer from the logits (W, V)."""
        most_likely = logits.float().argmax(dim=-1).tolist()
        for row, answer in enumerate(rows):
            if answer is not None:
                answer.token = answer.sample(logits[row]) if answer.sample else most_likely[row]

    def _emit(
        self, rows: list[_Answer | None], row: int, answer: _Answer
    ) -> Iterator[tuple[int, int | None]]:
        """Yield (prompt index, token) for an answer's newest token, unless it is the end token.

        When the answer is complete, free its row and slot, and yield (prompt index, None).
        """
        answer.remaining = 0 if answer.token == self.end_id else answer.remaining - 1
        if answer.token != self.end_id:
            yield answer.index, answer.token
        if not answer.remaining:
            rows[row] = None
            answer.slot.release()
            yield answer.index, None
