"""Tokens are sampled with the probabilities given by temperature and top_p."""

import pytest
import torch
from inference.prompts import make_engine, mixed_prompts

from internvl_chat.inference.sampling import Sampling
from internvl_chat.utils.errors import UsageError

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -4.0])


def shares(sampling: Sampling, count: int = 4000) -> torch.Tensor:
    sample = sampling.sampler(torch.device("cpu"))
    found = torch.tensor([sample(LOGITS) for _ in range(count)])
    return torch.bincount(found, minlength=len(LOGITS)) / count


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature(temperature):
    expected = torch.exp(LOGITS / temperature)
    expected /= expected.sum()
    assert (shares(Sampling(temperature, seed=1)) - expected).abs().max() < 0.03


def test_top_p_samples_only_the_most_likely():
    # The two most likely tokens have probabilities 0.64 and 0.24: 0.7 needs both, 0.6 only the first.
    first_two = torch.exp(LOGITS[:2])
    first_two /= first_two.sum()
    found = shares(Sampling(top_p=0.7, seed=1))
    assert (found[:2] - first_two).abs().max() < 0.03 and not found[2:].any()
    assert shares(Sampling(top_p=0.6, seed=1))[0] == 1


def test_seed_determines_the_samples():
    engine = make_engine()
    prompts = mixed_prompts(4)

    def answers(seed: int | None) -> list[list[int]]:
        return engine.generate_ids(prompts, max_new_tokens=12, sampling=Sampling(1.5, seed=seed))

    assert answers(1) == answers(1)
    assert answers(1) != answers(2)
    assert answers(None) != answers(None)


def test_a_low_temperature_is_greedy():
    engine = make_engine()
    prompts = mixed_prompts(4)
    sampled = engine.generate_ids(prompts, max_new_tokens=12, sampling=Sampling(1e-4, seed=1))
    assert sampled == engine.generate_ids(prompts, max_new_tokens=12)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0.0}, "temperature 0.0 must be above 0"),
        ({"temperature": -1.0}, "temperature -1.0 must be above 0"),
        ({"temperature": float("nan")}, "temperature nan must be above 0"),
        ({"top_p": 0.0}, "top_p 0.0 must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p 1.1 must be above 0 and at most 1"),
        ({"temperature": 0.0, "top_p": 2.0}, "2 problems"),
        ({"seed": 1 << 63}, "seed 9223372036854775808 must fit in 64 bits"),
    ],
)
def test_invalid_settings(values, message):
    with pytest.raises(UsageError, match=message):
        Sampling(**values)
