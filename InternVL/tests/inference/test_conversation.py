"""Messages of conversations with images in any question, and their training records."""

import pytest

from internvl_chat.data.sources.records import parse_record
from internvl_chat.inference.conversation import Question, build_messages, training_record
from internvl_chat.inference.engine import ask
from internvl_chat.utils.errors import DataError


def contents(*questions, answers=(), system=None):
    messages = build_messages([Question(*question) for question in questions], answers, system)
    return [message.content for message in messages]


def test_a_single_image_is_not_labeled():
    assert contents(("What?",)) == ["What?"]
    assert contents(("What?", 1)) == ["<image>\nWhat?"]
    assert contents(("What?", 1), ("Why?",), answers=["A."]) == ["<image>\nWhat?", "A.", "Why?"]


def test_labels_continue_in_later_questions():
    questions = (("What?", 2), ("Why?", 0), ("And this?", 1))
    assert contents(*questions, answers=["A.", "B."], system="Be brief.") == [
        "Be brief.",
        "Fig-0: <image>\nFig-1: <image>\nWhat?",
        "A.",
        "Why?",
        "B.",
        "Fig-2: <image>\nAnd this?",
    ]


def test_the_first_image_gets_a_label_when_a_second_one_is_added():
    assert contents(("What?", 1), ("Why?", 1), answers=["A."])[0] == "Fig-0: <image>\nWhat?"


def test_placeholders_mark_the_positions_of_images():
    questions = (("Is <image> like <image>?", 2), ("And this?", 1))
    assert contents(*questions, answers=["No."]) == [
        "Is <image> like <image>?", "No.", "Fig-2: <image>\nAnd this?",
    ]  # fmt: skip


def test_one_question_is_a_prompt_of_the_engine():
    for count in range(3):
        messages = build_messages([Question("What?", count)], system="Be brief.")
        assert messages == ask("What?", [None] * count, "Be brief.").messages


@pytest.mark.parametrize(
    ("questions", "answers", "message"),
    [
        ([("<image>?", 2)], [], "1 <image> placeholder, but 2 images"),
        ([("What?", 1), ("<image>?", 0)], ["A."], "1 <image> placeholder, but 0 images"),
        ([("Is <image 1> red?", 1)], [], "unsupported placeholder '<image 1>'; use <image>"),
        ([("a <IMG_CONTEXT>", 0)], [], "the user message contains the reserved token <IMG_CONTEXT>"),
        ([("What?", 0)], ["a <IMG_CONTEXT>"], "the assistant message contains the reserved token"),
        ([("What \ud800?", 0)], [], "the user message is not valid Unicode at character 6"),
    ],
)
def test_unusable_text(questions, answers, message):
    with pytest.raises(DataError, match=message):
        contents(*questions, answers=answers)


def test_a_training_record_contains_the_conversation():
    questions = [Question("What?", 1), Question("And this?", 2)]
    messages = build_messages(questions, ["A.", "B."], "Be brief.")
    record = training_record(messages, ["a.png", "b.png", "c.png"], id="chat")
    assert record["id"] == "chat"
    parsed = parse_record(record)
    assert parsed.messages == messages
    assert parsed.images == ("a.png", "b.png", "c.png")
    assert "image" not in training_record(build_messages([Question("What?")], ["A."]), [])


def test_a_single_image_stays_in_its_question():
    messages = build_messages([Question("What?"), Question("And this?", 1)], ["A.", "B."])
    assert parse_record(training_record(messages, ["a.png"])).messages == messages


def test_a_conversation_without_answers_is_not_a_record():
    messages = build_messages([Question("What?")], [" "])
    with pytest.raises(DataError, match="all answers are empty"):
        training_record(messages, [])
