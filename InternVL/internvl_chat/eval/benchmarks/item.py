"""One question of a benchmark, whatever format it was read from."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from internvl_chat.constants import IMAGE_PLACEHOLDER
from internvl_chat.data.sources.images import decode_image
from internvl_chat.data.sources.problems import RecordProblem
from internvl_chat.data.sources.records import Message
from internvl_chat.inference.engine import Prompt
from internvl_chat.metrics.choice import parse_choice
from internvl_chat.utils.errors import DataError

Key = tuple[str, int]


@dataclass(frozen=True)
class Figure:
    """An image of an item.

    Attributes:
        name: as the benchmark names it.
        label: what the question calls it, as `Fig-0`; may be empty.
        path: its file, or None where the benchmark holds the content itself.
        content: the bytes of the file, where there is no path.
    """

    name: str
    label: str = ""
    path: Path | None = None
    content: bytes | None = None

    def decode(self) -> Image.Image:
        """Return the image in RGB.

        Raises:
            DataError: it is missing or cannot be decoded.
        """
        try:
            if self.path is not None:
                return decode_image(self.path)
            with tempfile.NamedTemporaryFile() as file:
                file.write(self.content or b"")
                file.flush()
                return decode_image(Path(file.name))
        except RecordProblem as problem:
            held = None if self.path is not None else self.name  # else the message names the file
            raise DataError(str(problem), file=held, kind=problem.kind) from None


@dataclass(frozen=True)
class Item:
    """A question with its figures and the right answer.

    Attributes:
        task: what it is counted under.
        index: in its task, from 0.
        question: as it is asked, options included, images aside.
        reference: the right answer; of a multiple-choice question its letter.
        figures: in order.
        choices: the options' texts, the first with the letter A; none for an open question.
        accepted: further answers that are right as well, where exact match decides.
    """

    task: str
    index: int
    question: str
    reference: str
    figures: tuple[Figure, ...] = ()
    choices: tuple[str, ...] = ()
    accepted: tuple[str, ...] = ()

    @property
    def key(self) -> Key:
        """What names the item in its benchmark."""
        return (self.task, self.index)

    @property
    def text(self) -> str:
        """The user's message: the figures with their labels as in the training data, then the question."""
        if IMAGE_PLACEHOLDER in self.question:
            return self.question
        shown = [
            f"{f.label}: {IMAGE_PLACEHOLDER}\n" if f.label else f"{IMAGE_PLACEHOLDER}\n" for f in self.figures
        ]
        return "".join(shown) + self.question

    def messages(self, system: str | None) -> tuple[Message, ...]:
        """Return the conversation to be continued, without a system message if that is None."""
        asked = Message("user", self.text)
        return (asked,) if system is None else (Message("system", system), asked)

    def prompt(self, system: str | None) -> Prompt:
        """Return the conversation to be continued with its images decoded.

        Raises:
            DataError: an image cannot be used.
        """
        try:
            return Prompt(self.messages(system), [figure.decode() for figure in self.figures])
        except DataError as error:
            raise DataError(f"{self.task}, item {self.index}: {error}", kind=error.kind) from None

    def answered(self, prediction: str) -> str | None:
        """Return the letter that an answer to a multiple-choice question names, or None."""
        return parse_choice(prediction, self.choices)

    def correct(self, prediction: str) -> bool:
        """Say whether an answer is right: by its letter, or word for word where there are no options."""
        if self.choices:
            return self.answered(prediction) == self.reference
        said = prediction.strip().lower()
        return any(said == answer.strip().lower() for answer in (self.reference, *self.accepted))


@dataclass(frozen=True)
class Benchmark:
    """The items of a benchmark.

    Attributes:
        name: as on the command line.
        items: task by task.
        pooled: also count all tasks together, as for tasks that are parts of one set.
    """

    name: str
    items: tuple[Item, ...]
    pooled: bool = False

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks in order."""
        return tuple(dict.fromkeys(item.task for item in self.items))

    def select(self, tasks: Sequence[str] | None, limit: int | None) -> "Benchmark":
        """Return the benchmark with only the named tasks, and of each only the first items."""
        kept = [i for i in self.items if tasks is None or i.task in tasks]
        return Benchmark(self.name, tuple(i for i in kept if limit is None or i.index < limit), self.pooled)
