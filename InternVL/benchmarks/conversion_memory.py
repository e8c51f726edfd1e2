"""What memory `m3llm merge` and `m3llm export` take, and how long they do, for a model of full size.

A random model and random adapters are written to the folder for temporary files, or to `--folder`, and are
deleted: 16 GB for the 8B shape, and as much again for a result.
"""

import argparse
import contextlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
import torch

from benchmarks.options import names_of
from benchmarks.recipes import RECIPES
from benchmarks.report import write_report
from benchmarks.shapes import SHAPES, Shape, fill, weightless_model
from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.data.encode.tokenizer_training import save_tokenizer, train_tokenizer
from internvl_chat.model.io.adapter import BaseModel, save_adapter
from internvl_chat.model.io.folders import copy_companions, write_config
from internvl_chat.model.io.weights import weight_files, weights_digest, write_weights
from internvl_chat.model.lora.injection import add_lora
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel

SOURCE_ROOT = Path(__file__).resolve().parents[1]
WORKS = ("merge", "export")
_VOCABULARY = 600
_SECONDS_BETWEEN_LOOKS = 0.02


@dataclass(frozen=True)
class Conversion:
    """What was measured of one command.

    Attributes:
        work: `merge` or `export`.
        checked: whether source and result were compared, for which each is loaded once, in turn.
        shards: weight files of the result.
        seconds: of the command.
        peak_memory_gb: most resident memory, mapped weight files among it.
    """

    work: str
    checked: bool
    shards: int
    seconds: float
    peak_memory_gb: float


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="conversion_memory.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Example: python InternVL/benchmarks/conversion_memory.py --model internvl3-8b \\\n"
        "  --json memory.json",
    )
    add = parser.add_argument
    add("--model", choices=tuple(SHAPES), default="internvl3-8b", help="shape of the model [internvl3-8b]")
    add("--works", default=",".join(WORKS), help="any of merge,export [both]")
    add("--check", choices=("True", "False"), default="True", help="compare source and result [True]")
    add("--folder", type=Path, help="write the models to this disk [temporary files]")
    add("--json", metavar="FILE", type=Path, help="also write the figures here")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    works = names_of(parser, "--works", args.works, WORKS)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        adapter = write_adapter(Path(folder), SHAPES[args.model])
        try:
            found = [measure(work, adapter, Path(folder), args.check) for work in works]
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
    print(f"{'work':<8} {'checked':<8} {'shards':>6} {'seconds':>8} {'peak GB':>8}")
    for row in found:
        print(
            f"{row.work:<8} {row.checked!s:<8} {row.shards:>6} {row.seconds:>8.0f} {row.peak_memory_gb:>8.2f}"
        )
    if args.json:
        rows = [asdict(row) for row in found]
        write_report(args.json, rows=rows, arguments={"model": args.model, "check": args.check})
    return 0


def write_adapter(folder: Path, shape: Shape) -> Path:
    """Write a random base in bfloat16 and adapters of the LoRA recipe's rank; returns the folder of these."""
    base, adapter = folder / "base", folder / "adapter"
    model = weightless_model(shape).requires_grad_(False)
    write_base(base, model)
    add_lora(model, llm_rank=RECIPES["lora"].lora_rank)
    generator = torch.Generator().manual_seed(1)
    trained = {
        name: torch.empty(tensor.shape).normal_(0.0, 0.02, generator=generator)
        for name, tensor in model.state_dict().items()
        if ".lora_" in name
    }
    save_adapter(model, adapter, BaseModel(str(base), weights_digest(base)), trained)
    copy_companions(base, adapter)
    return adapter


def write_base(folder: Path, model: InternVLChatModel) -> None:
    """Write a whole model of the shape of one without weights, a shard at a time, with a small tokenizer."""
    folder.mkdir()
    save_tokenizer(train_tokenizer([Preprocessing.system_text], _VOCABULARY), folder)
    generator = torch.Generator().manual_seed(0)

    def draw(name: str, like: torch.Tensor) -> torch.Tensor:
        return fill(name, torch.empty(like.shape, dtype=like.dtype), model.config, generator)

    weights = {name: partial(draw, name, tensor) for name, tensor in model.state_dict().items()}
    write_weights(weights, folder)
    write_config(model.config, folder)


def measure(work: str, source: Path, folder: Path, check: str) -> Conversion:
    """Run a command, and delete what it makes.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    target = folder / work
    words = [sys.executable, "-m", "internvl_chat.cli", work, str(source), str(target), "--device", "cpu"]
    began, peak = time.perf_counter(), 0
    with (folder / "log.txt").open("w+", encoding="utf-8") as log:
        command = subprocess.Popen([*words, "--check", check], cwd=SOURCE_ROOT, stdout=log, stderr=log)
        process = psutil.Process(command.pid)
        while command.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                peak = max(peak, process.memory_info().rss)
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        seconds = time.perf_counter() - began
        if command.returncode:
            log.seek(0)
            raise RuntimeError(
                f"m3llm {work} ended with exit code {command.returncode}:\n{log.read()[-3000:]}"
            )
    shards = len(weight_files(target))
    shutil.rmtree(target)
    return Conversion(work, check == "True", shards, seconds, peak / 1e9)


if __name__ == "__main__":
    sys.exit(main())
