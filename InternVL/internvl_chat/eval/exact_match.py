"""Greedy answers against reference answers: exact match by data set, and whether it beats chance."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from scipy.stats import binomtest

from internvl_chat.data.record_set import RecordSet
from internvl_chat.inference.engine import Engine, last_question
from internvl_chat.metrics.overlap import exact_match


@dataclass(frozen=True)
class Answer:
    """A model's answer to the last question of a record.

    Attributes:
        dataset: name of the record's set.
        index: of the record in the set, from 0.
        id: in the file.
        prediction: the model's answer.
        reference: the assistant's last message.
        choices: all admissible answers where the record names them (`choices`), else none.
    """

    dataset: str
    index: int
    id: str | None
    prediction: str
    reference: str
    choices: tuple[str, ...] = ()

    @property
    def correct(self) -> bool:
        """Exact match, case and white space at the ends aside."""
        return bool(exact_match(self.prediction, self.reference))


def answer_records(
    engine: Engine,
    sets: Sequence[RecordSet],
    *,
    limit: int | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 8,
) -> Iterator[Answer]:
    """Answer the last question of the first `limit` records of each set (of all without a limit).

    Raises:
        DataError: a record cannot be used.
    """
    for records in sets:
        indices = records.first(limit)
        for start in range(0, len(indices), batch_size):
            yield from _answer_batch(engine, records, indices[start : start + batch_size], max_new_tokens)


def _answer_batch(
    engine: Engine, records: RecordSet, indices: Iterable[int], max_new_tokens: int
) -> Iterator[Answer]:
    parsed = [(index, records.record(index)) for index in indices]
    prompts, references = [], []
    for index, record in parsed:
        prompt, reference = last_question(record, records.images(index, record))
        prompts.append(prompt)
        references.append(reference)
    predictions = engine.answer(prompts, max_new_tokens=max_new_tokens)
    for (index, record), prediction, reference in zip(parsed, predictions, references, strict=True):
        choices = tuple(records.file[index].get("choices") or ())
        yield Answer(records.spec.name, index, record.id, prediction, reference, choices)


@dataclass(frozen=True)
class ChanceTest:
    """Whether answers to closed questions are better than guessing.

    Attributes:
        questions: how many closed questions there were.
        correct: how many were answered rightly.
        chance: the share that guessing would get.
        p_value: of the one-sided binomial test against that chance.
    """

    questions: int
    correct: int
    chance: float
    p_value: float


def beats_chance(answers: Iterable[Answer]) -> ChanceTest | None:
    """Test the closed questions (those with `choices`) against chance; None if there are none.

    Chance is one over the number of choices, averaged over the questions. With the mean for a common chance
    the binomial test is on the safe side (the true spread is smaller).
    """
    closed = [answer for answer in answers if answer.choices]
    if not closed:
        return None
    chance = sum(1 / len(answer.choices) for answer in closed) / len(closed)
    correct = sum(answer.correct for answer in closed)
    p_value = binomtest(correct, len(closed), chance, alternative="greater").pvalue
    return ChanceTest(len(closed), correct, chance, float(p_value))
