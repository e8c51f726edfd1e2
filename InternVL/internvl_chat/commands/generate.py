"""`m3llm generate`."""

import argparse

from internvl_chat.commands.common import add_model_arguments, positive
from internvl_chat.commands.output import emit, say
from internvl_chat.errors import DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `generate`."""
    parser.add_argument("question", help="text; <image> marks where each image goes")
    parser.add_argument("--model", required=True, help="model or adapter folder, or hub id")
    parser.add_argument("--image", action="append", default=[], help="an image; give it again for more")
    parser.add_argument(
        "--max_new_tokens", type=positive, default=512, help="most tokens of the answer [512]"
    )
    parser.add_argument("--max_dynamic_patch", type=positive, help="most tiles of all images [the model's]")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Answer a question."""
    from PIL import Image

    from internvl_chat.data.tiling import to_rgb
    from internvl_chat.inference.engine import Engine, ask

    images = []
    for path in args.image:
        try:
            images.append(to_rgb(Image.open(path)))
        except Exception as error:
            raise DataError(f"the image cannot be read: {error}", file=path) from None
    engine = Engine.from_checkpoint(
        args.model, device=args.device, base=args.base, max_dynamic_patch=args.max_dynamic_patch
    )
    [answer] = engine.answer([ask(args.question, images)], max_new_tokens=args.max_new_tokens)
    if args.json:
        emit({"question": args.question, "images": args.image, "answer": answer})
    else:
        say(answer)
    return 0
