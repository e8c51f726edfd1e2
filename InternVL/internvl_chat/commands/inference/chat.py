"""`m3llm chat`: chat about images in the terminal, or with lines from standard input."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from internvl_chat.commands.common import (
    add_generation_arguments,
    add_model_arguments,
    add_preprocessing_arguments,
    load_preprocessing,
    model_name,
    require_packages,
    sampling_options,
)
from internvl_chat.commands.output import echo
from internvl_chat.utils.errors import DataError, M3LLMError

if TYPE_CHECKING:
    from internvl_chat.inference.chat import Chat
    from internvl_chat.inference.sampling import Sampling
    from internvl_chat.inference.scheduler import Completion, Scheduler

_INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `chat`."""
    add = parser.add_argument
    add("model", help="model folder, adapter folder or hub id")
    add("--image", action="append", default=[], metavar="FILE",
        help="image of the first question; repeat for multiple images")  # fmt: skip
    add_generation_arguments(parser)
    add_preprocessing_arguments(parser)
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Answer questions until the end of the input."""
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if on_terminal:
        require_packages("chat", "prompt_toolkit")
    from internvl_chat.inference.chat import Chat
    from internvl_chat.inference.engine import Engine
    from internvl_chat.inference.scheduler import Scheduler
    from internvl_chat.model.io.folders import model_folder

    sampling = sampling_options(args)
    folder = model_folder(args.model)
    preprocessing = load_preprocessing(args, folder)
    chat = Chat(preprocessing.image_options, args.system)
    images = chat.attach(args.image)
    engine = Engine.from_checkpoint(folder, device=args.device, base=args.base, preprocessing=preprocessing)
    with Scheduler(engine) as scheduler:
        session = _Session(chat, scheduler, args.max_new_tokens, sampling, on_terminal)
        if not on_terminal:
            return session.read_lines()
        name = model_name(args.model, folder)
        echo(f"{name}: /help lists the commands, Ctrl+C stops an answer, Ctrl+D exits")
        if images:
            echo(images)
        session.read_terminal()
    return 0


class _Session:
    """Runs commands and answers questions.

    Args:
        on_terminal: report token counts, and continue after an error or an interrupt.
    """

    def __init__(
        self,
        chat: Chat,
        scheduler: Scheduler,
        max_new_tokens: int,
        sampling: Sampling | None,
        on_terminal: bool,
    ) -> None:
        self.chat, self.scheduler, self.on_terminal = chat, scheduler, on_terminal
        self.max_new_tokens, self.sampling = max_new_tokens, sampling

    def read_lines(self) -> int:
        """Handle each line of standard input; the first error or interrupt ends the session."""
        try:
            for line in sys.stdin:
                self._handle(line)
                if self.chat.closed:
                    break
        except UnicodeDecodeError as error:
            raise DataError(f"standard input is not text: {error}") from None
        except KeyboardInterrupt:
            return _INTERRUPTED
        return 0

    def read_terminal(self) -> None:
        """Handle lines from the terminal until the end of the input or the command `/exit`.

        Raises:
            SchedulerStoppedError: the model has failed.
        """
        from internvl_chat.commands.inference.line_editor import line_editor

        editor = line_editor()
        while not self.chat.closed:
            try:
                self._handle_or_report(editor.prompt("> "))
            except KeyboardInterrupt:
                continue
            except EOFError:
                return

    def _handle_or_report(self, line: str) -> None:
        from internvl_chat.inference.scheduler import SchedulerStoppedError

        try:
            self._handle(line)
        except SchedulerStoppedError:
            raise
        except M3LLMError as error:
            echo(str(error), stream=sys.stderr)

    def _handle(self, line: str) -> None:
        line = line.strip()
        if line.startswith("/"):
            if message := self.chat.run(line):
                echo(message, stream=None if self.on_terminal else sys.stderr)
        elif line:
            self._ask(line)

    def _ask(self, question: str) -> None:
        """Print the answer to a question as it is generated; an interrupt ends it."""
        prompt = self.chat.prompt(question)
        self.scheduler.engine.log_warnings(question)
        completion = self.scheduler.submit(prompt, max_new_tokens=self.max_new_tokens, sampling=self.sampling)
        pieces: list[str] = []
        complete = False
        try:
            for piece in completion:
                echo(piece, end="")
                pieces.append(piece)
            complete = True
        except KeyboardInterrupt:
            if not self.on_terminal:
                raise
        finally:
            completion.cancel()
            echo()
        begun = bool(pieces) or complete
        if begun:
            self.chat.add(question, "".join(pieces))
        if self.on_terminal:
            state = _describe(completion, complete) if begun else "[question discarded]"
            echo(state, stream=sys.stderr)


def _describe(completion: Completion, complete: bool) -> str:
    """Return the token counts of an answer, and why it ended early."""
    prompt, image = completion.prompt_tokens, completion.image_tokens
    tiles = f", {image:,} of them for {completion.encoded.num_tiles} tiles" if image else ""
    counts = f"prompt: {prompt:,} tokens{tiles}; answer: {completion.completion_tokens:,} tokens"
    if not complete:
        return f"[{counts}; stopped]"
    cut_off = "; cut off, see --max_new_tokens" if completion.finish_reason == "length" else ""
    return f"[{counts}{cut_off}]"
