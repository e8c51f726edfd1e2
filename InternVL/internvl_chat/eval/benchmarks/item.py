"""Benchmark items, independent of the file format."""

import tempfile
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from PIL import Image

from internvl_chat.constants import IMAGE_PLACEHOLDER
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


@dataclass(frozen=True)
class Figure:
    """An image of an item.

    Attributes:
        label: name of the image in the question, such as `Fig-0`; may be empty.
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
            options: how to read transparency and EXIF rotation.

        Raises:
            DataError: the image is missing or cannot be decoded.
        """
        return self._read(partial(decode_image, options=options))

    def check(self) -> None:
        """Read the header and the end of the image, and decode it if the end looks damaged.

        Raises:
            DataError: the image is missing or cannot be decoded.
        """
        self._read(_check_image)

    def _read(self, read: Callable[[Path], T]) -> T:
        """Call a function with the path of the image, in a temporary file if it is embedded."""
        try:
            if self.path is not None:
                return read(self.path)
            with tempfile.NamedTemporaryFile() as file:
                file.write(self.content or b"")
                file.flush()
                return read(Path(file.name))
        except RecordError as problem:
            name = None if self.path is not None else self.name  # the message already names the path
            raise DataError(str(problem), file=name, kind=problem.kind) from None


def _check_image(path: Path) -> None:
    info = image_info(path)
    if not info.has_end:
        check_decoding(path, info)


@dataclass(frozen=True)
class Item:
    """A question with its figures and its reference answer.

    Attributes:
        index: index in the task, from 0.
        question: the question, including its options.
        reference: reference answer; the letter of the correct option for multiple choice; empty if the
            benchmark has none.
        choices: texts of the options, starting with A; empty for an open question.
        accepted: further correct answers for exact match.
        problem: why the item cannot be used, with its location; empty for a usable item.
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
        """Identifier of the item in its benchmark."""
        return (self.task, self.index)

    @property
    def text(self) -> str:
        """User message: the labelled figures in the layout of the training data, then the question."""
        if IMAGE_PLACEHOLDER in self.question:
            return self.question
        shown = [
            f"{f.label}: {IMAGE_PLACEHOLDER}\n" if f.label else f"{IMAGE_PLACEHOLDER}\n" for f in self.figures
        ]
        return "".join(shown) + self.question

    def messages(self, system: str | None) -> tuple[Message, ...]:
        """Return the messages up to the answer; without a system message if `system` is None."""
        user = Message("user", self.text)
        return (user,) if system is None else (Message("system", system), user)

    def prompt(self, system: str | None, options: ImageOptions = REFERENCE) -> Prompt:
        """Return the messages with decoded images.

        Args:
            system: system message, if any.
            options: how to read transparency and EXIF rotation.

        Raises:
            DataError: an image cannot be read.
        """
        return Prompt(self.messages(system), self._read_figures(lambda figure: figure.decode(options)))

    def check_images(self) -> None:
        """Check the images without decoding them; see `Figure.check`.

        Raises:
            DataError: an image cannot be read.
        """
        self._read_figures(Figure.check)

    def _read_figures(self, read: Callable[[Figure], T]) -> list[T]:
        """Call a function with each figure; an error names the item."""
        try:
            return [read(figure) for figure in self.figures]
        except DataError as error:
            raise DataError(f"{self.task}, item {self.index}: {error}", kind=error.kind) from None

    def selected_letter(self, prediction: str) -> str | None:
        """Return the letter that an answer to a multiple-choice question selects, or None."""
        return parse_choice(prediction, self.choices)

    def is_correct(self, prediction: str) -> bool:
        """Return whether an answer is correct: by letter, or by exact match for open questions."""
        if self.choices:
            return self.selected_letter(prediction) == self.reference
        normalised = prediction.strip().lower()
        return any(normalised == answer.strip().lower() for answer in (self.reference, *self.accepted))


@dataclass(frozen=True)
class Benchmark:
    """The items of a benchmark.

    Attributes:
        items: usable items, grouped by task.
        pooled: whether to report metrics over all tasks together as well.
        excluded: items that cannot be used.
        totals: number of items of each task before any selection or exclusion; empty if unknown.
        other_tasks: tasks whose files were not read.
    """

    name: str
    items: tuple[Item, ...]
    pooled: bool = False
    excluded: tuple[Item, ...] = ()
    totals: Mapping[str, int] = field(default_factory=dict)
    other_tasks: tuple[str, ...] = ()

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks in order."""
        return tuple(dict.fromkeys(item.task for item in self.items))

    def select(self, tasks: Sequence[str] | None, limit: int | None) -> "Benchmark":
        """Return the benchmark with the first `limit` items of the given tasks (None: no restriction)."""
        selected = (
            item
            for item in self.items
            if (tasks is None or item.task in tasks) and (limit is None or item.index < limit)
        )
        return replace(self, items=tuple(selected))

    def keep(self, keys: Container[Key]) -> "Benchmark":
        """Return the benchmark with the items of the given keys."""
        return replace(self, items=tuple(item for item in self.items if item.key in keys))

    @property
    def labelled(self) -> "Benchmark":
        """The benchmark with the items that have a reference."""
        return replace(self, items=tuple(item for item in self.items if item.reference))


def log_lost_content(items: Sequence[Item], options: ImageOptions) -> None:
    """Log how many image files hold more than is shown, with one example of each kind."""
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
