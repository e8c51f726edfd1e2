"""Messages of a conversation in which any question may add images, and its training record."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from internvl_chat.constants import IMAGE_PLACEHOLDER
from internvl_chat.data.sources.dialects import misplaced_image
from internvl_chat.data.sources.problems import RecordError
from internvl_chat.data.sources.records import Message, check_text, parse_record
from internvl_chat.utils.errors import DataError
from internvl_chat.utils.text import counted

# Role of a message -> its name in a training record.
_ROLES = {"system": "system", "user": "human", "assistant": "gpt"}


@dataclass(frozen=True)
class Question:
    """A question of a conversation.

    Attributes:
        text: the question, with one placeholder per added image or none.
        num_images: number of images that are added with the question.
    """

    text: str
    num_images: int = 0


def build_messages(
    questions: Sequence[Question], answers: Sequence[str] = (), system: str | None = None
) -> tuple[Message, ...]:
    """Return the messages of a conversation, with one placeholder per image.

    Images of a question without placeholders are placed before it. If the conversation has multiple images,
    they are labeled `Fig-0`, `Fig-1`, ... across all questions, as in the training data.

    >>> [message.content for message in build_messages([Question("A?", 1), Question("B?", 1)], ["a"])]
    ['Fig-0: <image>\\nA?', 'a', 'Fig-1: <image>\\nB?']

    Args:
        questions: all questions.
        answers: answers to the first questions.
        system: system prompt; None for that of the checkpoint.

    Raises:
        DataError: a text is unusable, or its number of placeholders does not match its images.
    """
    labeled = sum(question.num_images for question in questions) > 1
    messages = [] if system is None else [Message("system", system)]
    shown = 0
    for number, question in enumerate(questions):
        placeholders = question.text.count(IMAGE_PLACEHOLDER)
        if placeholders not in (0, question.num_images):
            raise DataError(
                f"{counted(placeholders, f'{IMAGE_PLACEHOLDER} placeholder')}, but "
                f"{counted(question.num_images, 'image')}"
            )
        labels = [f"Fig-{shown + i}: " if labeled else "" for i in range(question.num_images)]
        messages.append(Message("user", place_images(question.text, labels)))
        messages += [Message("assistant", answer) for answer in answers[number : number + 1]]
        shown += question.num_images
    for message in messages:
        try:
            check_text(message.content, f"the {message.role} message")
        except RecordError as problem:
            raise DataError(str(problem)) from None
    return tuple(messages)


def place_images(question: str, labels: Sequence[str]) -> str:
    """Return a question with a placeholder per image before it, unless it already has placeholders.

    Args:
        question: text of the question.
        labels: text before each image; may be empty.

    Raises:
        DataError: the question contains only placeholders of another framework, such as `<image 1>`.
    """
    if problem := misplaced_image({}, (), (), question):
        raise DataError(f"{problem}; use {IMAGE_PLACEHOLDER} instead, once per image")
    if IMAGE_PLACEHOLDER in question:
        return question
    return "".join(f"{label}{IMAGE_PLACEHOLDER}\n" for label in labels) + question


def training_record(messages: Sequence[Message], images: Sequence[str], **fields: str) -> dict[str, Any]:
    """Return a conversation as a record of the training data.

    Args:
        messages: result of `build_messages`, ending with an answer.
        images: paths of the images in the order of their placeholders.
        **fields: other fields of the record.

    Raises:
        DataError: the conversation cannot be trained on, for example because all answers are empty.
    """
    record: dict[str, Any] = dict(fields)
    if images:
        record["image"] = list(images)
    record["conversations"] = [
        {"from": _ROLES[message.role], "value": message.content} for message in messages
    ]
    try:
        parse_record(record)
    except RecordError as problem:
        raise DataError(str(problem)) from None
    return record
