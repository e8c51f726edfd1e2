"""`m3llm tiny-model`: create a small model with random weights and its own tokenizer."""

import argparse
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from internvl_chat.commands.common import positive
from internvl_chat.commands.output import echo
from internvl_chat.constants import SYSTEM_TEXTS
from internvl_chat.model.tiny import TinyShape
from internvl_chat.utils.errors import DataError, UsageError

_SIZES = (
    "tile size in pixels, a multiple of 28", "hidden size of the vision tower",
    "layers of the vision tower", "attention heads of the vision tower", "hidden size of the language model",
    "layers of the language model", "query heads of the language model",
    "key/value heads of the language model",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `tiny-model`."""
    add = parser.add_argument
    add("folder", type=Path, help="folder to create")
    add("--text", type=Path, required=True,
        help="text to train the tokenizer on: a text or JSONL file, or a folder of such files")  # fmt: skip
    add("--vocab_size", type=positive, metavar="N", default=1024,
        help="vocabulary size without special tokens (default: 1024)")  # fmt: skip
    add("--seed", type=int, default=0, help="seed of the random weights (default: 0)")
    for field, meaning in zip(dataclasses.fields(TinyShape), _SIZES, strict=True):
        add(f"--{field.name}", type=positive, metavar="N", default=field.default,
            help=f"{meaning} (default: {field.default})")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Write the model, its tokenizer and its preprocessing options."""
    from internvl_chat.data.encode.preprocessing import Preprocessing
    from internvl_chat.data.encode.tokenizer import image_context_id
    from internvl_chat.data.encode.tokenizer_training import save_tokenizer, train_tokenizer
    from internvl_chat.model.tiny import build_tiny_model, save_tiny_model

    if args.folder.exists() and (not args.folder.is_dir() or any(args.folder.iterdir())):
        raise UsageError(f"{args.folder} already exists; choose a different folder")
    if args.vocab_size < 256:
        raise UsageError(f"--vocab_size {args.vocab_size}: must be at least 256 (one token per byte)")
    shape = TinyShape(**{field.name: getattr(args, field.name) for field in dataclasses.fields(TinyShape)})
    if shape.problems():
        raise UsageError(shape.problems())
    tokenizer = train_tokenizer(_texts(args.text), args.vocab_size)
    model = build_tiny_model(
        shape, vocab_size=len(tokenizer), image_context_id=image_context_id(tokenizer), seed=args.seed
    )
    staging = args.folder.with_name(f".{args.folder.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    save_tiny_model(model, staging, tokenizer.eos_token_id, tokenizer.pad_token_id)
    save_tokenizer(tokenizer, staging)
    Preprocessing.from_model_config(model.config).save(staging)
    if args.folder.exists():
        args.folder.rmdir()
    staging.rename(args.folder)
    parameters = sum(p.numel() for p in model.parameters())
    echo(f"{args.folder}: {parameters:,} parameters, vocabulary of {len(tokenizer)} tokens")
    return 0


def _texts(path: Path) -> Iterator[str]:
    """Yield the lines or messages of a file, or of all text and JSONL files under a folder.

    As in training, the default system prompt precedes each record, so that it is tokenized into few tokens.
    """
    files = [path] if path.is_file() else sorted([*path.rglob("*.txt"), *path.rglob("*.jsonl")])
    if not files:
        raise DataError("no .txt or .jsonl file found", file=path)
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            if file.suffix != ".jsonl":
                yield line
                continue
            try:
                messages = json.loads(line).get("conversations", [])
            except (ValueError, AttributeError) as error:
                raise DataError(f"invalid record: {error}", file=file) from None
            yield SYSTEM_TEXTS["internvl2_5"]
            yield from (message["value"] for message in messages)
