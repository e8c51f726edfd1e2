"""Line editor of `m3llm chat`: history, and completion of commands and paths."""

import re
import shlex
from collections.abc import Iterator

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory

from internvl_chat.inference.chat import COMMANDS
from internvl_chat.utils.logging import get_logger
from internvl_chat.utils.paths import state_folder

logger = get_logger(__name__)


def line_editor() -> PromptSession[str]:
    """Return an editor for the lines of a chat on this terminal."""
    return PromptSession(history=_history(), completer=ChatCompleter(), complete_in_thread=True)


def _history() -> History:
    """Return the history of earlier chats, which only the user can read."""
    try:
        file = state_folder() / "chat_history"
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file.touch(mode=0o600)
        with file.open("ab"):
            return FileHistory(str(file))
    except (OSError, RuntimeError) as error:
        logger.warning("the chat history is not saved: %s", error)
        return InMemoryHistory()


class ChatCompleter(Completer):
    """Completes commands, and the paths after `/image` and `/save`."""

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        """Yield the possible completions of the text before the cursor."""
        text = document.text_before_cursor
        name, space, arguments = text.partition(" ")
        if not space and text.startswith("/"):
            for command, (_, summary) in COMMANDS.items():
                if command.startswith(text):
                    yield Completion(command, -len(text), display_meta=summary)
        elif space and name in ("/image", "/save"):
            path, quote = _last_argument(arguments)
            for found in self._paths.get_completions(Document(path), complete_event):
                yield Completion(_escape(found.text, quote), display=found.display)


def _last_argument(arguments: str) -> tuple[str, str]:
    """Return the argument at the end of a line, and its missing closing quotation mark.

    >>> _last_argument("a.png 'my fig")
    ('my fig', "'")
    >>> _last_argument("a.png ")
    ('', '')
    """
    for quote in ("", '"', "'"):
        try:
            return shlex.split(f"{arguments}x{quote}")[-1][:-1], quote
        except ValueError:
            continue
    return "", ""


def _escape(text: str, quote: str) -> str:
    """Escape a part of a path for an argument in the given quotation marks, which may be empty."""
    special = {"": r"[\s\"'\\]", '"': r"[\"\\]", "'": r"(?!)"}[quote]
    return re.sub(special, r"\\\g<0>", text)
