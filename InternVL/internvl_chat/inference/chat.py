"""State of a chat: its messages, images and commands, independent of the terminal."""

import io
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from internvl_chat.data.sources.image_content import ImageOptions
from internvl_chat.data.sources.images import open_images
from internvl_chat.inference.conversation import Question, build_messages, training_record
from internvl_chat.inference.engine import Prompt
from internvl_chat.utils.errors import DataError, UsageError
from internvl_chat.utils.files import append_json_line

# Command -> arguments and summary.
COMMANDS = {
    "/image": ("PATH...", "add images to the next question"),
    "/reset": ("", "start a new conversation without images"),
    "/system": ("[TEXT]", "replace the system prompt; without TEXT, use the checkpoint's"),
    "/save": ("FILE", "append the conversation to a .jsonl file of training records"),
    "/help": ("", "list the commands"),
    "/exit": ("", "exit the chat"),
}


class Chat:
    """A conversation that is controlled by lines of text.

    Args:
        options: how to read transparency and EXIF rotation of images.
        system: system prompt; None for that of the checkpoint.

    Attributes:
        closed: whether the command `/exit` was given.
    """

    def __init__(self, options: ImageOptions, system: str | None = None) -> None:
        self.options, self.system = options, system
        self.closed = False
        self._questions: list[Question] = []
        self._answers: list[str] = []
        self._images: list[Image.Image] = []
        self._paths: list[str] = []

    @property
    def _asked_images(self) -> int:
        """Number of images of the questions so far; the others belong to the next question."""
        return sum(question.num_images for question in self._questions)

    def prompt(self, question: str) -> Prompt:
        """Return the conversation with a new question and the images added for it.

        Raises:
            DataError: the number of placeholders in the question does not match these images.
        """
        questions = [*self._questions, self._next(question)]
        return Prompt(build_messages(questions, self._answers, self.system), tuple(self._images))

    def add(self, question: str, answer: str) -> None:
        """Append a question, the images added for it, and its answer to the conversation."""
        self._questions.append(self._next(question))
        self._answers.append(answer)

    def _next(self, question: str) -> Question:
        return Question(question, len(self._images) - self._asked_images)

    def attach(self, paths: Sequence[str]) -> str:
        """Add images to the next question, and return a description of each.

        Raises:
            DataError: an image cannot be read; no image is added.
        """
        names = list(map(_expand_home, paths))
        images = open_images(names, self.options)
        files = [Path(name).absolute() for name in names]
        first = len(self._images)
        self._images += images
        self._paths += map(str, files)
        return "\n".join(
            f"Fig-{number}: {file.name}, {image.width} x {image.height} pixels"
            for number, (file, image) in enumerate(zip(files, images, strict=True), first)
        )

    def run(self, line: str) -> str:
        """Run a command and return a message for the user.

        Args:
            line: text that begins with a slash.

        Raises:
            UsageError: the command is unknown, or its arguments are invalid.
            DataError: a file cannot be read or written.
        """
        name, *arguments = line.split(maxsplit=1)
        commands: dict[str, Callable[[str], str]] = {
            "/image": self._attach_files,
            "/reset": self._reset,
            "/system": self._set_system,
            "/save": self._save,
            "/help": self._help,
            "/exit": self._exit,
        }
        if name not in commands:
            raise UsageError(f"unknown command {name!r:.80}; /help lists the commands")
        return commands[name](arguments[0].strip() if arguments else "")

    def _attach_files(self, arguments: str) -> str:
        paths = _split(arguments)
        if not paths:
            raise UsageError("/image requires the path of an image")
        return self.attach(paths)

    def _reset(self, arguments: str) -> str:
        for part in (self._questions, self._answers, self._images, self._paths):
            part.clear()
        return "new conversation"

    def _set_system(self, text: str) -> str:
        self.system = text or None
        return "system prompt replaced" if text else "the system prompt is that of the checkpoint"

    def _save(self, arguments: str) -> str:
        """Append the conversation to a file; images added for the next question are not part of it."""
        paths = _split(arguments)
        if len(paths) != 1 or not paths[0].endswith(".jsonl"):
            raise UsageError("/save requires the path of one .jsonl file")
        if not self._answers:
            raise UsageError("there is nothing to save yet: ask a question first")
        messages = build_messages(self._questions, self._answers, self.system)
        record = training_record(messages, self._paths[: self._asked_images])
        file = Path(_expand_home(paths[0]))
        try:
            with file.open("a+b") as stream:
                if stream.seek(0, io.SEEK_END):
                    stream.seek(-1, io.SEEK_END)
                    if stream.read(1) != b"\n":
                        stream.write(b"\n")
                append_json_line(stream, record)
        except (OSError, ValueError) as error:
            raise DataError(f"cannot be written: {getattr(error, 'strerror', error)}", file=file) from None
        return f"appended to {file}"

    def _help(self, arguments: str) -> str:
        usages = {f"{name} {arguments}": summary for name, (arguments, summary) in COMMANDS.items()}
        width = max(map(len, usages))
        return "\n".join(f"{usage:{width}}  {summary}" for usage, summary in usages.items())

    def _exit(self, arguments: str) -> str:
        self.closed = True
        return ""


def _split(arguments: str) -> list[str]:
    """Split arguments like a shell: quotes and backslashes protect spaces."""
    try:
        return shlex.split(arguments)
    except ValueError:
        raise UsageError("a quotation mark is not closed") from None


def _expand_home(path: str) -> str:
    return os.path.expanduser(path)  # noqa: PTH111  # unlike Path, it keeps URLs and unknown users
