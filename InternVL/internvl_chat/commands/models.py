"""`m3llm tiny-model`."""

import argparse
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from internvl_chat.commands.common import positive
from internvl_chat.commands.output import say
from internvl_chat.model.tiny_shape import TinyShape
from internvl_chat.utils.errors import DataError, UsageError


def add_tiny_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `tiny-model`."""
    parser.add_argument("folder", type=Path, help="new folder to write")
    parser.add_argument(
        "--text",
        type=Path,
        required=True,
        help="what the tokenizer learns from: a text or JSONL file, or a folder of them",
    )
    parser.add_argument(
        "--vocab_size", type=positive, default=1024, help="entries before special tokens [1024]"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights [0]")
    for field in dataclasses.fields(TinyShape):
        parser.add_argument(
            f"--{field.name}", type=positive, default=field.default, help=f"[{field.default}]"
        )


def run_tiny_model(args: argparse.Namespace) -> int:
    """Write a small model with random weights."""
    from internvl_chat.data.encode.preprocessing import Preprocessing
    from internvl_chat.data.encode.tokenizer import image_context_id
    from internvl_chat.data.encode.tokenizer_training import save_tokenizer, train_tokenizer
    from internvl_chat.model.tiny import build_tiny_model, save_tiny_model

    if args.folder.exists() and (not args.folder.is_dir() or any(args.folder.iterdir())):
        raise UsageError(f"{args.folder}: exists; choose a new folder")
    if args.vocab_size < 256:
        raise UsageError(f"--vocab_size {args.vocab_size}: at least the 256 bytes are needed")
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
    say(f"{args.folder}: {parameters:,} parameters, vocabulary {len(tokenizer)}")
    return 0


def _texts(path: Path) -> Iterator[str]:
    """Yield the texts of a file, or of all text and JSONL files under a folder."""
    files = [path] if path.is_file() else sorted([*path.rglob("*.txt"), *path.rglob("*.jsonl")])
    if not files:
        raise DataError("no text or JSONL file found", file=path)
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            if file.suffix != ".jsonl":
                yield line
                continue
            try:
                messages = json.loads(line).get("conversations", [])
            except (ValueError, AttributeError) as error:
                raise DataError(f"not a record: {error}", file=file) from None
            yield from (message["value"] for message in messages)
