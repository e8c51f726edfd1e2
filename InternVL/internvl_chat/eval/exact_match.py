"""Exact match of greedy answers, and a significance test of the accuracy on closed questions."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import binomtest

from internvl_chat.data.record_set import RecordSet
from internvl_chat.data.sources.skip_policy import SkippedRecord
from internvl_chat.inference.engine import Engine, is_truncated, last_question
from internvl_chat.metrics.overlap import exact_match
from internvl_chat.utils.errors import DataError
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class Answer:
    """Model answer to the last question of a record.

    Attributes:
        reference: last assistant message.
        choices: permitted answers, from `choices` in the record; empty for open questions.
        truncated: whether the answer was cut off at the maximum number of tokens.
    """

    dataset: str
    index: int
    id: str | None
    prediction: str
    reference: str
    choices: tuple[str, ...] = ()
    truncated: bool = False

    @property
    def correct(self) -> bool:
        """Whether the answer equals the reference, ignoring case and surrounding whitespace."""
        return bool(exact_match(self.prediction, self.reference))


def answer_records(
    engine: Engine,
    sets: Sequence[RecordSet],
    *,
    limit: int | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    skipped: list[SkippedRecord] | None = None,
) -> Iterator[Answer]:
    """Answer the last question of each record.

    Args:
        engine: the model.
        sets: the datasets.
        limit: use the first `limit` records of each dataset (default: all).
        max_new_tokens: maximum tokens per answer.
        batch_size: number of records that are loaded together.
        skipped: list to which unusable records are appended; None to raise an error instead.

    Raises:
        DataError: a record is unusable and `skipped` is None.
    """
    for records in sets:
        indices = records.first(limit)
        for start in range(0, len(indices), batch_size):
            batch = indices[start : start + batch_size]
            yield from _answer_batch(engine, records, batch, max_new_tokens, skipped)


def _answer_batch(
    engine: Engine,
    records: RecordSet,
    indices: Iterable[int],
    max_new_tokens: int,
    skipped: list[SkippedRecord] | None,
) -> Iterator[Answer]:
    parsed, prompts, references = [], [], []
    for index in indices:
        try:
            record = records.record(index)
            prompt, reference = last_question(record, records.images(index, record))
            choices = _choices(records, index, record.id)
            if skipped is not None:
                engine.encode(prompt)
        except DataError as error:
            if skipped is None:
                raise
            logger.warning("skipped: %s", error)
            skipped.append(SkippedRecord(records.spec.name, index, error.record, str(error)))
            continue
        parsed.append((index, record, choices))
        prompts.append(prompt)
        references.append(reference)
    predictions = engine.answer(prompts, max_new_tokens=max_new_tokens)
    for (index, record, choices), prediction, reference in zip(parsed, predictions, references, strict=True):
        yield Answer(
            records.spec.name, index, record.id, prediction, reference, choices, is_truncated(prediction)
        )


def _choices(records: RecordSet, index: int, record_id: str | None) -> tuple[str, ...]:
    """Return the permitted answers to the question of a record; () for an open question.

    Raises:
        DataError: `choices` is not a list of at least two answers.
    """
    choices = records.file[index].get("choices")
    if choices is None or choices == []:
        return ()
    if not isinstance(choices, list) or len(choices) < 2:
        message = f"'choices' must be a list of at least two answers, found {choices!r:.80}"
        raise records.error(index, message, record_id)
    return tuple(choices)


def score_dataset(
    name: str, answers: Iterable[Answer], skipped: Sequence[SkippedRecord] = ()
) -> dict[str, Any]:
    """Return the JSON row with the scores of a dataset.

    It contains the number of records and their exact match, first for all records, then for closed questions
    (records with `choices`). Exact match is None without records. If `skipped` is not empty, the row also
    contains the number of skipped records.

    Args:
        name: name of the dataset.
        answers: answers to the records of all datasets.
        skipped: skipped records of all datasets.
    """
    answers = [answer for answer in answers if answer.dataset == name]
    closed = [answer for answer in answers if answer.choices]
    return {
        "dataset": name,
        "records": len(answers),
        "exact_match": _accuracy(answers),
        "closed": len(closed),
        "closed_accuracy": _accuracy(closed),
        **({"skipped": sum(record.dataset == name for record in skipped)} if skipped else {}),
    }


def _accuracy(answers: Sequence[Answer]) -> float | None:
    return sum(answer.correct for answer in answers) / len(answers) if answers else None


@dataclass(frozen=True)
class ChanceTest:
    """Significance test of the accuracy on closed questions against chance.

    Attributes:
        chance: expected accuracy of random guesses.
        p_value: p-value of a one-sided binomial test.
    """

    questions: int
    correct: int
    chance: float
    p_value: float


def compare_with_chance(answers: Iterable[Answer]) -> ChanceTest | None:
    """Test whether the accuracy on closed questions is above chance; return None if there are none.

    Chance is the mean of 1 / (number of choices). If the number of choices varies between questions, the test
    is conservative, because the true variance is smaller than that of the binomial distribution.
    """
    closed = [answer for answer in answers if answer.choices]
    if not closed:
        return None
    chance = sum(1 / len(answer.choices) for answer in closed) / len(closed)
    correct = sum(answer.correct for answer in closed)
    p_value = binomtest(correct, len(closed), chance, alternative="greater").pvalue
    return ChanceTest(len(closed), correct, chance, float(p_value))
