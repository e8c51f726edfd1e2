"""Temperature and nucleus (top-p) sampling."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from internvl_chat.utils.errors import UsageError

# Temperatures below this are greedy decoding; dividing logits by them would overflow.
MIN_TEMPERATURE = 1e-5


@dataclass(frozen=True)
class Sampling:
    """Sampling options.

    Each answer is sampled with a separate random generator, so it does not depend on other prompts.

    Attributes:
        temperature: divisor of the logits; values below 1 favor the most likely tokens.
        top_p: sample from the smallest set of most likely tokens with at least this total probability.
        seed: seed of the generator of each answer; None for a random seed.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        problems = []
        if not 0 < self.temperature < float("inf"):
            problems.append(f"temperature {self.temperature} must be above 0 and finite")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p {self.top_p} must be above 0 and at most 1")
        if self.seed is not None and not -(1 << 63) <= self.seed < 1 << 63:
            problems.append(f"seed {self.seed} must fit in 64 bits")
        if problems:
            raise UsageError(problems)

    def sampler(self, device: torch.device) -> Callable[[torch.Tensor], int]:
        """Return a function that samples a token id from logits (V,).

        Create one function per answer, because it has its own random generator.
        """
        generator = torch.Generator(device)
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        warp = LogitsProcessorList([TemperatureLogitsWarper(self.temperature), TopPLogitsWarper(self.top_p)])

        no_ids: Any = None  # ignored by these processors

        def sample(logits: torch.Tensor) -> int:
            scores = warp(no_ids, logits.float().unsqueeze(0))
            return int(torch.multinomial(scores.softmax(dim=-1), 1, generator=generator))

        return sample
