"""Batched decoding in which answers are bitwise independent of the other answers in the batch.

Prompts are prefilled one at a time. A decoding step has a fixed number of rows, one for the newest token of
each answer. Attention handles each row separately (see `cached_attention`), so a row does not depend on the
others or on their number. Answers join and leave the batch between steps; a free row is reused.

Shapes: T tokens of a prompt, C hidden size, W rows, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import PreTrainedModel

from internvl_chat.inference.cached_attention import DecodeStep, KVCache, Prefill, Slot, cached_attention
from internvl_chat.inference.sampling import Sampling

# Number of rows per decoding step. On a GPU, a step with this many rows still spends most of its time reading
# the weights.
_ROWS = {"cpu": 8, "cuda": 32}
# Maximum number of tokens in the KV cache; a token takes 57 kB with InternVL3-8B.
_MAX_CACHED_TOKENS = 1 << 16


@dataclass(eq=False)
class Answer:
    """Answer of a `Decoder`.

    Attributes:
        max_new_tokens: maximum number of tokens.
        sample: function that samples a token from logits; None for greedy decoding.
        ids: the generated tokens, without the end token.
        finish_reason: `stop` after the end token, `length` after `max_new_tokens` tokens, else None.
    """

    max_new_tokens: int
    sample: Callable[[torch.Tensor], int] | None
    ids: list[int] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None


class Decoder:
    """Decodes answers to prompts with a language model, in a batch that answers join and leave at any time.

    Args:
        end_id: id of the token that ends an answer.

    Attributes:
        rows: the answers in progress; None for a free row.
    """

    def __init__(self, language_model: PreTrainedModel, *, end_id: int) -> None:
        self.language_model, self.end_id = language_model, end_id
        self.embed_tokens = language_model.get_input_embeddings()
        self.device = self.embed_tokens.get_parameter("weight").device
        self.rows: list[Answer | None] = [None] * _ROWS.get(self.device.type, _ROWS["cuda"])
        self._slots: dict[Answer, Slot] = {}
        self._cache = self._new_cache()

    def run(
        self, prompts: Iterable[torch.Tensor], *, max_new_tokens: int, sampling: Sampling | None = None
    ) -> Iterator[tuple[int, int | None]]:
        """Decode an answer to each prompt, as many in parallel as fit in the rows and the KV cache.

        Args:
            prompts: embeddings (T, C) of each prompt; consumed lazily, one prompt ahead.
            max_new_tokens: maximum number of tokens per answer.
            sampling: sampling options; None for greedy decoding.

        Yields:
            (prompt index, next token); the token is None when the answer is complete.
        """
        waiting = enumerate(prompts)
        upcoming = next(waiting, None)
        indices: dict[Answer, int] = {}
        while upcoming is not None or indices:
            while upcoming is not None:
                answer = self.add(upcoming[1], max_new_tokens=max_new_tokens, sampling=sampling)
                if answer is None:
                    break
                indices[answer] = upcoming[0]
                yield from _progress(answer, indices)
                upcoming = next(waiting, None)
            for answer in self.step():
                yield from _progress(answer, indices)

    @torch.no_grad()
    def add(
        self, embeddings: torch.Tensor, *, max_new_tokens: int, sampling: Sampling | None = None
    ) -> Answer | None:
        """Prefill a prompt and choose the first token of its answer, which may complete it.

        Args:
            embeddings: embeddings of the prompt, (T, C).
            max_new_tokens: maximum number of tokens of the answer.
            sampling: sampling options; None for greedy decoding.

        Returns:
            The answer; None if there is no room for it until another answer has left the batch.
        """
        if None not in self.rows:
            return None
        slot = self._cache.reserve(len(embeddings) + max_new_tokens)
        if slot is None:
            return None
        answer = Answer(max_new_tokens, sampling.sampler(embeddings.device) if sampling else None)
        self.rows[self.rows.index(None)] = answer
        self._slots[answer] = slot
        positions = torch.arange(len(embeddings), device=embeddings.device).unsqueeze(0)
        try:
            self._choose([answer], self._logits(embeddings.unsqueeze(0), positions, Prefill(slot)))
        except BaseException:
            self.remove(answer)
            raise
        return answer

    @torch.no_grad()
    def step(self) -> list[Answer]:
        """Decode the next token of each answer in progress; answers that are then complete leave the batch.

        Returns:
            All answers that were in progress.
        """
        rows = list(self.rows)
        answers = [answer for answer in rows if answer is not None]
        if not answers:
            return []
        tokens = [[self.end_id if answer is None else answer.ids[-1]] for answer in rows]
        positions = [[0 if answer is None else self._slots[answer].length] for answer in rows]
        embeddings = self.embed_tokens(torch.tensor(tokens, device=self.device))  # (W, 1, C)
        step = DecodeStep([None if answer is None else self._slots[answer] for answer in rows])
        self._choose(rows, self._logits(embeddings, torch.tensor(positions, device=self.device), step))
        return answers

    def remove(self, answer: Answer) -> None:
        """Remove an answer in progress from the batch; the KV cache is freed with the last one."""
        self.rows[self.rows.index(answer)] = None
        self._slots.pop(answer).release()
        if not any(self.rows):
            self._cache = self._new_cache()

    def _new_cache(self) -> KVCache:
        return KVCache(len(self.rows), _MAX_CACHED_TOKENS)

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

    def _choose(self, rows: Sequence[Answer | None], logits: torch.Tensor) -> None:
        """Choose the next token of each answer from the logits (W, V)."""
        most_likely = logits.float().argmax(dim=-1).tolist()
        for row, answer in enumerate(rows):
            if answer is not None:
                token = answer.sample(logits[row]) if answer.sample else most_likely[row]
                self._append(answer, token)

    def _append(self, answer: Answer, token: int) -> None:
        """Append a token to an answer; if it is complete, remove it from the batch."""
        if token == self.end_id:
            answer.finish_reason = "stop"
        else:
            answer.ids.append(token)
            if len(answer.ids) == answer.max_new_tokens:
                answer.finish_reason = "length"
        if answer.finish_reason:
            self.remove(answer)


def _progress(answer: Answer, indices: dict[Answer, int]) -> Iterator[tuple[int, int | None]]:
    """Yield the newest token of an answer and, if it is complete, None; see `Decoder.run`."""
    index = indices[answer]
    if answer.finish_reason != "stop":
        yield index, answer.ids[-1]
    if answer.finish_reason:
        del indices[answer]
        yield index, None
