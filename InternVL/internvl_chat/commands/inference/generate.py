"""`m3llm generate`: answer questions about images."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

from internvl_chat.commands.common import (
    add_model_arguments,
    add_preprocessing_arguments,
    load_preprocessing,
    positive,
)
from internvl_chat.commands.output import echo, print_json
from internvl_chat.utils.errors import UsageError
from internvl_chat.utils.logging import get_logger

if TYPE_CHECKING:
    from internvl_chat.inference.engine import Engine, Prompt
    from internvl_chat.inference.sampling import Sampling

logger = get_logger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `generate`."""
    add = parser.add_argument
    add("question", nargs="*",
        help="question, with <image> to mark the position of an image; more questions continue the "
        "conversation")  # fmt: skip
    add("--model", required=True, help="model folder, adapter folder or hub id")
    add("--image", action="append", default=[], help="image file; repeat for multiple images")
    add("--chat", action="store_true", help="read more questions from standard input, one per line")
    add("--system", metavar="TEXT", help="system prompt (default: from the checkpoint)")
    add("--max_new_tokens", type=positive, metavar="N", default=512,
        help="maximum tokens per answer (default: 512)")  # fmt: skip
    add("--temperature", type=float, default=0.0,
        help="sampling temperature, for example 0.7; 0 is greedy decoding (default: 0)")  # fmt: skip
    add("--top_p", type=float, help="probability mass of nucleus sampling (default: 1)")
    add("--seed", type=int, help="seed for reproducible sampling")
    add_preprocessing_arguments(parser)
    add("--json", action="store_true", help="print one JSON object per answer")
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Answer the questions of one conversation."""
    from internvl_chat.data.sources.images import open_images
    from internvl_chat.inference.engine import Engine, ask
    from internvl_chat.model.io.folders import model_folder

    if any(not question.strip() for question in args.question):
        raise UsageError("empty question")
    if not args.question and not args.chat:
        raise UsageError("no question given; add one, or use --chat to enter questions")
    if _looks_unquoted(args.question):
        logger.warning(
            "the %d words are treated as separate questions; put a question that contains spaces in quotes",
            len(args.question),
        )
    sampling = _sampling(args)
    preprocessing = load_preprocessing(args, model_folder(args.model))
    images = open_images(args.image, preprocessing.image_options)
    engine = Engine.from_checkpoint(
        args.model, device=args.device, base=args.base, preprocessing=preprocessing
    )
    prompt, answer = None, ""
    for question in chain(args.question, _read_questions() if args.chat else ()):
        engine.log_warnings(question)
        prompt = prompt.then(answer, question) if prompt else ask(question, images, args.system)
        answer = _answer(engine, prompt, args, sampling)
        if args.json:
            print_json({"question": question, "images": args.image, "answer": answer})
    return 0


def _looks_unquoted(questions: list[str]) -> bool:
    """Return whether the questions look like the words of one question without quotes."""
    words = all(len(question.split()) == 1 for question in questions)
    return words and len(questions) > 1 and not any(q.endswith(("?", ".", "!")) for q in questions[:-1])


def _sampling(args: argparse.Namespace) -> Sampling | None:
    """Return the sampling options, or None for greedy decoding."""
    from internvl_chat.inference.sampling import Sampling

    if args.temperature:
        return Sampling(args.temperature, 1.0 if args.top_p is None else args.top_p, args.seed)
    if args.top_p is not None or args.seed is not None:
        raise UsageError("--top_p and --seed require --temperature; without it, decoding is greedy")
    return None


def _answer(engine: Engine, prompt: Prompt, args: argparse.Namespace, sampling: Sampling | None) -> str:
    """Generate and return an answer; without `--json`, also print it (streamed if stdout is a terminal)."""
    options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "sampling": sampling}
    if args.json or not sys.stdout.isatty():
        [answer] = engine.answer([prompt], **options)
        if not args.json:
            echo(answer)
        return answer
    pieces = []
    for piece in engine.stream(prompt, **options):
        echo(piece, end="")
        pieces.append(piece)
    echo()
    return "".join(pieces)


def _read_questions() -> Iterator[str]:
    """Yield lines from standard input until an empty line; show a prompt on a terminal."""
    while True:
        if sys.stdin.isatty():
            echo("> ", end="", stream=sys.stderr)
        question = sys.stdin.readline().strip()
        if not question:
            return
        yield question
