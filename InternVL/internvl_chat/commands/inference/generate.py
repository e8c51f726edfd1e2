"""`m3llm generate`: answer questions about images."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from internvl_chat.commands.common import (
    add_generation_arguments,
    add_model_arguments,
    add_preprocessing_arguments,
    load_preprocessing,
    sampling_options,
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
    add("question", nargs="+",
        help="question, with <image> to mark the position of an image; more questions continue the "
        "conversation")  # fmt: skip
    add("--model", required=True, help="model folder, adapter folder or hub id")
    add("--image", action="append", default=[], help="image file; repeat for multiple images")
    add_generation_arguments(parser)
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
    if _looks_unquoted(args.question):
        logger.warning(
            "the %d words are treated as separate questions; put a question that contains spaces in quotes",
            len(args.question),
        )
    sampling = sampling_options(args)
    preprocessing = load_preprocessing(args, model_folder(args.model))
    images = open_images(args.image, preprocessing.image_options)
    engine = Engine.from_checkpoint(
        args.model, device=args.device, base=args.base, preprocessing=preprocessing
    )
    prompt, answer = None, ""
    for question in args.question:
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
