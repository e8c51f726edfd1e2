"""Exact match: prompts, correctness, and the significance test against chance."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from model.conftest import make_model
from PIL import Image
from scipy.stats import binom
from small_sets import write_lines

from internvl_chat.data.encode.encoder import RecordEncoder
from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.data.encode.tokenizer_training import train_tokenizer
from internvl_chat.data.record_set import RecordSet
from internvl_chat.data.sources.meta import DatasetSpec
from internvl_chat.data.sources.records import Message
from internvl_chat.eval.exact_match import Answer, answer_records, compare_with_chance
from internvl_chat.inference.engine import Engine, Prompt
from internvl_chat.utils.errors import DataError

RECORDS = {
    "closed": [
        {
            "id": f"c{i}",
            "image": f"{i % 2}.png",
            "choices": ["A", "B", "C"],
            "conversations": [
                {"from": "human", "value": f"<image>\nWhich {i}?"},
                {"from": "gpt", "value": "ABC"[i % 3]},
            ],
        }
        for i in range(5)
    ],
    "open": [
        {
            "id": "o0",
            "image": ["0.png", "1.png"],
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Fig-0: <image>\nFig-1: <image>\nSame?"},
                {"from": "gpt", "value": "No."},
                {"from": "human", "value": "Why?"},
                {"from": "gpt", "value": " The scan "},
            ],
        },
        {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]},
    ],
}


class Recorder:
    """Fake engine that returns the given answers and records the prompts."""

    def __init__(self, answers: Sequence[str] = ()) -> None:
        self.answers, self.prompts, self.batches, self.limits = list(answers), [], [], set()

    def answer(self, prompts: Sequence[Prompt], *, max_new_tokens: int) -> list[str]:
        self.prompts += prompts
        self.batches.append(len(prompts))
        self.limits.add(max_new_tokens)
        return [self.answers.pop(0) if self.answers else "?" for _ in prompts]


@pytest.fixture(scope="module")
def encoder() -> RecordEncoder:
    tokenizer = train_tokenizer(["Which? Same? Why? The scan. That."], 270)
    options = Preprocessing(system_text="x", tile_size=56, tokens_per_tile=4, max_dynamic_patch=1)
    return RecordEncoder(tokenizer, options)


@pytest.fixture
def sets(tmp_path: Path, encoder: RecordEncoder) -> list[RecordSet]:
    for number in range(2):
        Image.new("L", (30 + number, 40), 60 * number).save(tmp_path / f"{number}.png")
    for name, records in RECORDS.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    specs = [DatasetSpec(name, root=tmp_path, annotation=tmp_path / f"{name}.jsonl") for name in RECORDS]
    return [RecordSet(spec, encoder) for spec in specs]


def test_last_question_of_each_record(sets: list[RecordSet]) -> None:
    engine = Recorder()
    answers = list(answer_records(engine, sets))
    assert [(a.dataset, a.index, a.id) for a in answers] == [
        *(("closed", i, f"c{i}") for i in range(5)),
        ("open", 0, "o0"),
        ("open", 1, None),
    ]
    assert [tuple(prompt.messages) for prompt in engine.prompts] == [
        *((Message("user", f"<image>\nWhich {i}?"),) for i in range(5)),
        (
            Message("system", "Be brief."),
            Message("user", "Fig-0: <image>\nFig-1: <image>\nSame?"),
            Message("assistant", "No."),
            Message("user", "Why?"),
        ),
        (Message("user", "What?"),),
    ]
    sizes = [[image.size for image in prompt.images] for prompt in engine.prompts]
    assert sizes == [[(30 + i % 2, 40)] for i in range(5)] + [[(30, 40), (31, 40)], []]
    assert all(image.mode == "RGB" for prompt in engine.prompts for image in prompt.images)
    assert [a.reference for a in answers] == ["A", "B", "C", "A", "B", " The scan ", "That."]
    assert [a.choices for a in answers] == [("A", "B", "C")] * 5 + [()] * 2


def test_predictions_match_their_records(sets: list[RecordSet]) -> None:
    given = ["A", "A", " C\n", "a", "B.", "The scan", "That"]
    answers = list(answer_records(Recorder(given), sets, batch_size=3))
    assert [a.prediction for a in answers] == given
    assert [a.correct for a in answers] == [True, False, True, True, False, True, False]


@pytest.mark.parametrize(
    ("limit", "batch_size", "batches"),
    [(None, 2, [2, 2, 1, 2]), (None, 8, [5, 2]), (1, 8, [1, 1]), (3, 2, [2, 1, 2]), (100, 8, [5, 2])],
)
def test_batches_and_limits(
    sets: list[RecordSet], limit: int | None, batch_size: int, batches: list[int]
) -> None:
    engine = Recorder()
    found = list(answer_records(engine, sets, limit=limit, batch_size=batch_size, max_new_tokens=17))
    assert engine.batches == batches and len(found) == sum(batches)
    assert engine.limits == {17}


def test_real_engine(sets: list[RecordSet], encoder: RecordEncoder, tmp_path: Path) -> None:
    model = make_model(llm={"vocab_size": len(encoder.tokenizer)})
    model.image_context_id = encoder.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    engine = Engine(model, encoder.tokenizer, encoder.preprocessing)
    answers = list(answer_records(engine, sets, max_new_tokens=6, batch_size=4))
    assert any(answer.truncated for answer in answers)
    images = [Image.open(tmp_path / f"{number}.png") for number in range(2)]
    messages = RECORDS["open"][0]["conversations"][:4]
    roles = {"system": "system", "human": "user", "gpt": "assistant"}
    prompt = Prompt([Message(roles[message["from"]], message["value"]) for message in messages], images)
    assert answers[5].prediction == engine.answer([prompt], max_new_tokens=6)[0]
    assert len({answer.prediction for answer in answers}) > 1


@pytest.mark.parametrize("choices", ["yes or no", {"A": "yes", "B": "no"}, ["yes"], ""])
def test_invalid_choices(tmp_path: Path, encoder: RecordEncoder, choices: object) -> None:
    record = {"conversations": [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "no"}]}
    rows = [{**record, "choices": ["yes", "no"]}, {**record, "id": "x", "choices": choices}]
    file = write_lines(tmp_path / "t.jsonl", rows)
    sets = [RecordSet(DatasetSpec("t", tmp_path, file), encoder)]
    with pytest.raises(DataError, match=r"line 2.*'choices' must be a list of at least two answers"):
        list(answer_records(Recorder(), sets))


@pytest.mark.parametrize("fault", ["missing", "damaged"])
def test_error_of_an_unreadable_image_contains_the_record(
    sets: list[RecordSet], tmp_path: Path, fault: str
) -> None:
    (tmp_path / "1.png").unlink()
    if fault == "damaged":
        (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"closed\.jsonl, line 2.*'c1'.*1\.png"):
        list(answer_records(Recorder(), sets))


def answers_of(outcomes: Sequence[tuple[bool, int]]) -> list[Answer]:
    """Return answers for pairs of (correct, number of choices)."""
    letters = [chr(ord("A") + i) for i in range(10)]
    return [
        Answer("set", index, None, "A" if right else "B", "A", tuple(letters[:choices]))
        for index, (right, choices) in enumerate(outcomes)
    ]


@pytest.mark.parametrize(
    ("right", "questions", "choices"), [(9, 12, 4), (3, 12, 4), (0, 5, 2), (5, 5, 2), (1, 1, 3)]
)
def test_chance_with_equal_numbers_of_choices(right: int, questions: int, choices: int) -> None:
    found = compare_with_chance(answers_of([(i < right, choices) for i in range(questions)]))
    assert (found.questions, found.correct) == (questions, right)
    assert found.chance == pytest.approx(1 / choices)
    # P(X >= right), summed from the terms of the binomial distribution.
    expected = sum(binom.pmf(k, questions, 1 / choices) for k in range(right, questions + 1))
    assert found.p_value == pytest.approx(expected, abs=1e-12)


def test_chance_by_hand() -> None:
    # Two of three right with two choices each: (3 + 1) / 8.
    found = compare_with_chance(answers_of([(True, 2), (True, 2), (False, 2)]))
    assert found.p_value == pytest.approx(0.5)


def test_chance_with_unequal_numbers_of_choices_is_conservative() -> None:
    outcomes = [(True, 2), (True, 4), (True, 5), (False, 2), (True, 10)]
    found = compare_with_chance(answers_of(outcomes))
    assert found.chance == pytest.approx((1 / 2 + 1 / 4 + 1 / 5 + 1 / 2 + 1 / 10) / 5)
    rng = np.random.default_rng(0)
    guesses = sum((rng.random(200_000) < 1 / choices).astype(int) for _, choices in outcomes)
    assert found.p_value > (guesses >= 4).mean()


def test_open_questions_are_excluded() -> None:
    closed = answers_of([(True, 2), (False, 2)])
    assert compare_with_chance([*closed, *answers_of([(True, 0)] * 5)]) == compare_with_chance(closed)
    assert compare_with_chance(answers_of([(True, 0)])) is None
    assert compare_with_chance([]) is None
