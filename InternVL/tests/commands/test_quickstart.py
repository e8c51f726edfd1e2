"""Model comparison of the quickstart: table, checks and example command."""

import itertools
import shlex

import pytest

from internvl_chat.commands.quickstart import TITLES, Result, example_command, failures, table
from internvl_chat.data.dataset import build_sets
from internvl_chat.data.encode.encoder import RecordEncoder
from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.data.sources.meta import load_meta
from internvl_chat.eval.exact_match import Answer

WITHHELD = "qa-subimage-option"
LETTERS = ("A", "B", "C", "D")
QUESTIONS = 20


def result(*, loss: float, correct: int, withheld_loss: float, withheld_correct: int) -> Result:
    """Return a result with closed questions in all tasks except the text-only task."""
    losses, answers = [], []
    for name in TITLES:
        value, right = (withheld_loss, withheld_correct) if name == WITHHELD else (loss, correct)
        choices = () if name == "qa-puretext" else LETTERS
        losses += [(name, value)] * QUESTIONS
        answers += [
            Answer(name, index, None, "A" if index < right else "B", "A", choices)
            for index in range(QUESTIONS)
        ]
    return Result(losses, answers)


BASE = result(loss=7.0, correct=0, withheld_loss=7.0, withheld_correct=0)
FULL = result(loss=0.5, correct=15, withheld_loss=8.0, withheld_correct=0)
LORA = result(loss=0.4, correct=16, withheld_loss=1.0, withheld_correct=14)


def test_table():
    header, rows = table([BASE, FULL, LORA], WITHHELD)
    assert header == ["held-out task", "records", "loss: base", "full", "+ LoRA", "accuracy: chance",
                      "base", "full", "+ LoRA"]  # fmt: skip
    assert ["multiple choice *", "20", "7.00", "8.00", "1.00", "25%", "0%", "0%", "70%"] in rows
    assert ["text only", "20", "7.00", "0.50", "0.40", "-", "-", "-", "-"] in rows
    assert rows[-1] == ["all", "120", "7.00", "1.75", "0.50", "25%", "0%", "60%", "78%"]
    assert len(rows) == len(TITLES) + 1


def test_stages_that_learned_pass():
    assert list(failures([BASE, FULL, LORA], WITHHELD)) == []


@pytest.mark.parametrize(
    ("full", "lora", "message"),
    [
        (
            {"loss": 6.0},
            {},
            "full-model stage: the held-out loss of its tasks changed from 7.000 to 6.000, but must fall",
        ),
        ({"loss": float("nan")}, {}, "full-model stage: the held-out loss"),
        (
            {},
            {"withheld_loss": 7.0},
            "LoRA stage: the held-out loss of its tasks changed from 8.000 to 7.000, but must fall",
        ),
        ({}, {"correct": 5, "withheld_correct": 6}, "accuracy on closed questions after both stages"),
    ],
)
def test_stage_that_did_not_learn_fails(full, lora, message):
    learned = {"loss": 0.5, "correct": 15, "withheld_loss": 8.0, "withheld_correct": 0}
    taught = {"loss": 0.4, "correct": 16, "withheld_loss": 1.0, "withheld_correct": 14}
    [problem] = failures([BASE, result(**learned | full), result(**taught | lora)], WITHHELD)
    assert problem.startswith(message)


def test_example_command_shows_all_images_of_the_question(sample_data, tmp_path):
    sets = build_sets(
        load_meta(sample_data / "held_out.json", tmp_path), RecordEncoder(None, Preprocessing())
    )
    words = shlex.split(example_command(tmp_path, sets, WITHHELD))
    assert words[:4] == ["m3llm", "generate", "--model", str(tmp_path / "merged")]
    images = [value for flag, value in itertools.pairwise(words) if flag == "--image"]
    assert len(images) == words[-1].count("<image>") == 2
    assert "candidate options" in words[-1]
