"""Benchmark items, independent of the file format."""

import re
import tempfile
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from PIL import Image

from internvl_chat.constants import ANSWER_TOKENS, IMAGE_PLACEHOLDER
from internvl_chat.data.sources.image_content import ImageOptions, content_warnings
from internvl_chat.data.sources.images import REFERENCE, check_decoding, decode_image, image_info
from internvl_chat.data.sources.problems import RecordError
from internvl_chat.data.sources.records import Message
from internvl_chat.inference.engine import Prompt
from internvl_chat.metrics.multiple_choice import parse_choice
from internvl_chat.utils.errors import DataError
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

Key = tuple[str, int]
T = TypeVar("T")

_ANSWER_TOKEN = re.compile("|".join(ANSWER_TOKENS))


@dataclass(frozen=True)
class Figure:
    """An image of an item.

    Attributes:
        name: image name in the benchmark.
        label: label of the image in the question, such as `Fig-0`; may be empty.
        path: image file, or None if the benchmark embeds the image.
        content: bytes of an embedded image.
    """

    name: str
    label: str = ""
    path: Path | None = None
    content: bytes | None = None

    def decode(self, options: ImageOptions = REFERENCE) -> Image.Image:
        """Return the image in RGB.

        Args:
            options: handling of transparency and EXIF rotation.

        Raises:
            DataError: the image is missing or cannot be decoded.
        """
        return self._read(partial(decode_image, options=options))

    def check(self) -> None:
        """Check the header and the end of the image file; decode the image only if its end looks damaged.

        Raises:
            DataError: the image is missing or cannot be decoded.
        """
        self._read(_check_image)

    def _read(self, read: Callable[[Path], T]) -> T:
        """Call `read` with the image path; an embedded image is first written to a temporary file."""
        try:
            if self.path is not None:
                return read(self.path)
            with tempfile.NamedTemporaryFile() as file:
                file.write(self.content or b"")
                file.flush()
                return read(Path(file.name))
        except RecordError as problem:
            name = None if self.path is not None else self.name  # the message contains the path
            raise DataError(str(problem), file=name, kind=problem.kind) from None


def _check_image(path: Path) -> None:
    info = image_info(path)
    if not info.has_end:
        check_decoding(path, info)


@dataclass(frozen=True)
class Item:
    """A question with its figures and its reference answer.

    Attributes:
        index: 0-based index in the task.
        question: the question, including its options.
        reference: reference answer, or for multiple choice the letter of the correct option; empty if the
            benchmark has no answers.
        choices: text of the options A, B, ...; empty for open questions.
        accepted: other answers that count as an exact match.
        problem: why and where the item is invalid; empty if it is usable.
    """

    task: str
    index: int
    question: str
    reference: str
    figures: tuple[Figure, ...] = ()
    choices: tuple[str, ...] = ()
    accepted: tuple[str, ...] = ()
    problem: str = ""

    @property
    def key(self) -> Key:
        """Task and index, which identify the item in its benchmark."""
        return (self.task, self.index)

    @property
    def text(self) -> str:
        """User message: the question, preceded by labeled image placeholders as in the training data."""
        if IMAGE_PLACEHOLDER in self.question:
            return self.question
        shown = [
            f"{f.label}: {IMAGE_PLACEHOLDER}\n" if f.label else f"{IMAGE_PLACEHOLDER}\n" for f in self.figures
        ]
        return "".join(shown) + self.question

    def messages(self, system: str | None) -> tuple[Message, ...]:
        """Return the system message (unless `system` is None) and the user message."""
        user = Message("user", self.text)
        return (user,) if system is None else (Message("system", system), user)

    def prompt(self, system: str | None, options: ImageOptions = REFERENCE) -> Prompt:
        """Return the messages and the decoded images as a prompt.

        Args:
            system: system prompt; None for the checkpoint's.
            options: handling of transparency and EXIF rotation.

        Raises:
            DataError: an image cannot be read.
        """
        return Prompt(self.messages(system), self._read_figures(lambda figure: figure.decode(options)))

    def check_images(self) -> None:
        """Check the images, if possible without decoding them; see `Figure.check`.

        Raises:
            DataError: an image cannot be read.
        """
        self._read_figures(Figure.check)

    def _read_figures(self, read: Callable[[Figure], T]) -> list[T]:
        """Call `read` with each figure; error messages contain the task and index."""
        try:
            return [read(figure) for figure in self.figures]
        except DataError as error:
            raise DataError(f"{self.task}, item {self.index}: {error}", kind=error.kind) from None

    def selected_letter(self, prediction: str) -> str | None:
        """Return the letter of the option that a prediction selects, or None if none can be parsed."""
        return parse_choice(plain_text(prediction), self.choices)

    def is_correct(self, prediction: str) -> bool:
        """Return whether a prediction selects the correct option or, for open questions, matches exactly."""
        if self.choices:
            return self.selected_letter(prediction) == self.reference
        prediction = plain_text(prediction).strip().lower()
        accepted = (plain_text(answer).strip().lower() for answer in (self.reference, *self.accepted))
        return prediction in accepted


def plain_text(answer: str) -> str:
    """Remove tokens such as `<box>` from an answer, as the published evaluation does before scoring."""
    return _ANSWER_TOKEN.sub("", answer).strip() if _ANSWER_TOKEN.search(answer) else answer


@dataclass(frozen=True)
class Benchmark:
    """The items of a benchmark.

    Attributes:
        items: usable items, grouped by task.
        pooled: whether the report also includes metrics over all tasks together.
        short_answers: whether open answers are scored on normalized words (`normalize_words`).
        excluded: invalid items.
        totals: task -> number of items, including excluded and unselected ones; empty if unknown.
        other_tasks: tasks whose files were not read.
    """

    name: str
    items: tuple[Item, ...]
    pooled: bool = False
    short_answers: bool = False
    excluded: tuple[Item, ...] = ()
    totals: Mapping[str, int] = field(default_factory=dict)
    other_tasks: tuple[str, ...] = ()

    @property
    def tasks(self) -> tuple[str, ...]:
        """Task names in the order of the items."""
        return tuple(dict.fromkeys(item.task for item in self.items))

    def select(self, tasks: Sequence[str] | None, limit: int | None) -> "Benchmark":
        """Return the benchmark with only some tasks (None: all) and their first `limit` items (None: all)."""
        selected = (
            item
            for item in self.items
            if (tasks is None or item.task in tasks) and (limit is None or item.index < limit)
        )
        return replace(self, items=tuple(selected))

    def keep(self, keys: Container[Key]) -> "Benchmark":
        """Return the benchmark restricted to the given item keys."""
        return replace(self, items=tuple(item for item in self.items if item.key in keys))

    @property
    def labeled(self) -> "Benchmark":
        """The benchmark restricted to items with a reference answer."""
        return replace(self, items=tuple(item for item in self.items if item.reference))


def log_lost_content(items: Sequence[Item], options: ImageOptions) -> None:
    """Warn about image content that is ignored, such as additional frames or transparency.

    Log one line per type of content, with the number of images and an example.
    """
    found: dict[str, list[str]] = {}
    for path in dict.fromkeys(f.path for item in items for f in item.figures if f.path is not None):
        try:
            content = image_info(path).content
        except RecordError:  # reported when the item is answered
            continue
        for kind, message in content_warnings([path.name], [content], options, [None]):
            found.setdefault(kind, []).append(message)
    for kind, messages in found.items():
        logger.warning("%s: %d images, e.g. %s", kind, len(messages), messages[0])
