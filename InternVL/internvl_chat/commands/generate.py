"""`m3llm generate`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from internvl_chat.commands.common import add_model_arguments, positive
from internvl_chat.commands.output import emit, say, write
from internvl_chat.utils.errors import DataError, UsageError, format_problems

if TYPE_CHECKING:
    from PIL import Image

    from internvl_chat.inference.engine import Engine, Prompt
    from internvl_chat.inference.sampling import Sampling


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `generate`."""
    parser.add_argument(
        "question", nargs="*",
        help="text; <image> marks where each image goes. Further ones are asked after the answers",
    )  # fmt: skip
    parser.add_argument("--model", required=True, help="model or adapter folder, or hub id")
    parser.add_argument("--image", action="append", default=[], help="an image; give it again for more")
    parser.add_argument("--chat", action="store_true", help="read further questions, a line each")
    parser.add_argument("--system", metavar="TEXT", help="system text [the model's]")
    parser.add_argument("--max_new_tokens", type=positive, default=512, help="most tokens of an answer [512]")
    parser.add_argument(
        "--temperature", type=float, default=0.0,
        help="draw tokens at random, e.g. 0.7; 0 always takes the likeliest [0]",
    )  # fmt: skip
    parser.add_argument("--top_p", type=float, help="draw only from the likeliest tokens of this probability")
    parser.add_argument("--seed", type=int, help="draw the same again")
    parser.add_argument("--max_dynamic_patch", type=positive, help="most tiles of all images [the model's]")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each answer")
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Answer the questions of one conversation."""
    from internvl_chat.inference.engine import Engine, ask

    if any(not question.strip() for question in args.question):
        raise UsageError("a question is empty")
    if not args.question and not args.chat:
        raise UsageError("a question is missing; give it, or --chat to be asked for it")
    sampling = _sampling(args)
    images = _open_images(args.image)
    engine = Engine.from_checkpoint(
        args.model, device=args.device, base=args.base, max_dynamic_patch=args.max_dynamic_patch
    )
    prompt, answer = None, ""
    for question in chain(args.question, _read_questions() if args.chat else ()):
        prompt = prompt.then(answer, question) if prompt else ask(question, images, args.system)
        answer = _answer(engine, prompt, args, sampling)
        if args.json:
            emit({"question": question, "images": args.image, "answer": answer})
    return 0


def _sampling(args: argparse.Namespace) -> Sampling | None:
    """Return how tokens are drawn; None for greedy."""
    from internvl_chat.inference.sampling import Sampling

    if args.temperature:
        return Sampling(args.temperature, 1.0 if args.top_p is None else args.top_p, args.seed)
    if args.top_p is not None or args.seed is not None:
        raise UsageError("--top_p and --seed need --temperature: without it the likeliest token is taken")
    return None


def _open_images(paths: Sequence[str]) -> list[Image.Image]:
    """Decode images as training does.

    Raises:
        DataError: names all that cannot be used.
    """
    from internvl_chat.data.sources.images import decode_image
    from internvl_chat.data.sources.problems import RecordProblem

    images, problems = [], []
    for path in paths:
        if not Path(path).exists():
            problems.append(f"the image {path} does not exist")
            continue
        try:
            images.append(decode_image(Path(path)))
        except RecordProblem as problem:
            problems.append(str(problem))
    if problems:
        raise DataError(format_problems(problems))
    return images


def _answer(engine: Engine, prompt: Prompt, args: argparse.Namespace, sampling: Sampling | None) -> str:
    """Return an answer; a person sees it, on a terminal while it is made."""
    options = {"max_new_tokens": args.max_new_tokens, "sampling": sampling}
    if args.json or not sys.stdout.isatty():
        [answer] = engine.answer([prompt], **options)
        if not args.json:
            say(answer)
        return answer
    pieces = []
    for piece in engine.stream(prompt, **options):
        write(piece)
        pieces.append(piece)
    say()
    return "".join(pieces)


def _read_questions() -> Iterator[str]:
    """Yield the lines of standard input up to its end or an empty line; a person is asked for them."""
    person = sys.stdin.isatty()
    while True:
        if person:
            write("> ", sys.stderr)
        question = sys.stdin.readline().strip()
        if not question:
            return
        yield question
