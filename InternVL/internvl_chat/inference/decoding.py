"""From the embeddings of prompts to tokens, many prompts at a time, each as if it were alone.

A prompt runs through the model by itself. Then the newest token of each answer under way is a row of a matrix
whose height is fixed, and attention takes each row by itself. What comes out of a row depends neither on the
others nor on how many are in use: so an answer is the same, to the last bit, whatever is answered beside it.
When one ends, the next prompt takes its row.

Shapes: T tokens of a prompt, C width, W rows, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from internvl_chat.inference.cached_attention import RowCache, cached_attention
from internvl_chat.inference.sampling import Sampling

# Rows of a decoding step. On a GPU the weights' way through memory is what costs, not the rows.
_ROWS = {"cpu": 8, "cuda": 32}
# Most tokens that keys and values are kept of: 57 kB each for InternVL3-8B.
_MOST_KEPT = 1 << 16


@dataclass
class _Answer:
    """An answer under way.

    Attributes:
        number: of its prompt.
        cache: of its row.
        left: tokens that it may yet have.
        draw: chooses a token by its logits; None for the likeliest.
        token: the newest.
    """

    number: int
    cache: RowCache
    left: int
    draw: Callable[[torch.Tensor], int] | None
    token: int = -1


class Decoder:
    """Answers prompts with a language model.

    Args:
        language_model: a decoder of transformers with a head.
        end_id: the token that ends an answer.
        max_new_tokens: most tokens of an answer.
        sampling: None for the likeliest token, always.
    """

    def __init__(
        self, language_model: PreTrainedModel, *, end_id: int, max_new_tokens: int, sampling: Sampling | None
    ) -> None:
        self.language_model, self.end_id = language_model, end_id
        self.max_new_tokens, self.sampling = max_new_tokens, sampling
        self.words = language_model.get_input_embeddings()

    @torch.no_grad()
    def run(self, prompts: Iterable[torch.Tensor]) -> Iterator[tuple[int, int | None]]:
        """Answer prompts, as many at a time as rows and memory allow.

        Args:
            prompts: embeddings (T, C) each, taken when there is a row for it.

        Yields:
            The number of a prompt with the next token of its answer, or with None when that is complete.
        """
        waiting = enumerate(prompts)
        following = next(waiting, None)
        rows: list[_Answer | None] = []
        while following is not None or any(rows):
            while following is not None and (place := self._find_row(rows, following[1])) is not None:
                answer = self._begin(*following)
                yield from self._tell(answer)
                rows[place] = answer if answer.left else None
                following = next(waiting, None)
            if any(rows):
                self._step(rows)
            for place, answer in enumerate(rows):
                if answer is not None:
                    yield from self._tell(answer)
                    rows[place] = answer if answer.left else None

    def _find_row(self, rows: list[_Answer | None], embeddings: torch.Tensor) -> int | None:
        """Return a free row for a prompt; None if there is none, or no memory beside the others."""
        if not rows:
            rows += [None] * _ROWS.get(embeddings.device.type, _ROWS["cuda"])
        kept = sum(answer.cache.capacity for answer in rows if answer is not None)
        if None not in rows or (kept and kept + len(embeddings) + self.max_new_tokens > _MOST_KEPT):
            return None
        return rows.index(None)

    def _begin(self, number: int, embeddings: torch.Tensor) -> _Answer:
        """Run a prompt through the model, and choose the first token of its answer."""
        cache = RowCache(len(embeddings) + self.max_new_tokens)
        draw = self.sampling.draws(embeddings.device) if self.sampling else None
        answer = _Answer(number, cache, self.max_new_tokens, draw)
        positions = torch.arange(len(embeddings), device=embeddings.device).unsqueeze(0)
        self._choose([answer], self._logits(embeddings.unsqueeze(0), positions, [cache]))
        return answer

    def _step(self, rows: list[_Answer | None]) -> None:
        """Give each answer its next token."""
        tokens = [[self.end_id if answer is None else answer.token] for answer in rows]
        positions = [[0 if answer is None else answer.cache.length] for answer in rows]
        device = self.words.weight.device
        embeddings = self.words(torch.tensor(tokens, device=device))  # (W, 1, C)
        caches = [None if answer is None else answer.cache for answer in rows]
        self._choose(rows, self._logits(embeddings, torch.tensor(positions, device=device), caches))

    def _logits(
        self, embeddings: torch.Tensor, positions: torch.Tensor, caches: list[RowCache | None]
    ) -> torch.Tensor:
        """Return the logits (B, V) behind the last token of (B, L, C)."""
        with cached_attention(self.language_model):
            output = self.language_model(
                inputs_embeds=embeddings,
                position_ids=positions,
                use_cache=False,
                logits_to_keep=1,
                row_caches=caches,
            )
        for cache in caches:
            if cache is not None:
                cache.length += embeddings.shape[1]
        return output.logits[:, -1].to(embeddings.device)

    def _choose(self, rows: list[_Answer | None], logits: torch.Tensor) -> None:
        """Set the newest token of each answer."""
        likeliest = logits.float().argmax(dim=-1).tolist()
        for row, answer in enumerate(rows):
            if answer is not None:
                answer.token = answer.draw(logits[row]) if answer.draw else likeliest[row]

    def _tell(self, answer: _Answer) -> Iterator[tuple[int, int | None]]:
        """Yield an answer's newest token, and its end."""
        if answer.token == self.end_id:
            answer.left = 0
        else:
            answer.left -= 1
            yield answer.number, answer.token
        if not answer.left:
            yield answer.number, None
