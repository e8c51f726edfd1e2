"""Peak memory and duration of `m3llm merge` and `m3llm export` for a full-size model.

A model and adapters with random weights are written to a temporary folder, or to `--folder`, and deleted
at the end. An 8B model requires 32 GB of disk space: 16 GB for the model, and 16 GB for the result.
"""

import argparse
import contextlib
import shutil
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

from benchmarks.common import parse_names, write_report
from benchmarks.presets.recipes import RECIPES
from benchmarks.shapes import SHAPES, Shape, fill, weightless_model
from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.data.encode.tokenizer_training import save_tokenizer, train_tokenizer
from internvl_chat.model.io.adapter import BaseModel, save_adapter
from internvl_chat.model.io.folders import read_auxiliary_files, write_config, write_files
from internvl_chat.model.io.weights import weight_files, weights_digest, write_weights
from internvl_chat.model.lora.injection import add_lora
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel

SOURCE_ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("merge", "export")
_VOCABULARY = 600
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Conversion:
    """Measurements of one command.

    Attributes:
        work: command, `merge` or `export`.
        checked: whether the command compared its result with the source (loaded one after the other).
        shards: number of weight files in the result.
        seconds: duration of the command.
        peak_memory_gb: peak resident memory, including mapped weight files.
    """

    work: str
    checked: bool
    shards: int
    seconds: float
    peak_memory_gb: float


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        prog="conversion_memory.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Example: python InternVL/benchmarks/conversion_memory.py --model internvl3-8b \\\n"
        "  --json memory.json",
    )
    add = parser.add_argument
    add("--model", choices=tuple(SHAPES), default="internvl3-8b", help="model shape (default: internvl3-8b)")
    add("--works", default=",".join(COMMANDS), help="comma-separated: merge,export (default: both)")
    add(
        "--check", choices=("True", "False"), default="True", help="compare source and result (default: True)"
    )
    add("--folder", type=Path, help="folder of the models (default: temporary folder)")
    add("--json", metavar="FILE", type=Path, help="write the results as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line and return the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    commands = parse_names(parser, "--works", args.works, COMMANDS)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        adapter = write_adapter(Path(folder), SHAPES[args.model])
        try:
            rows = [measure(command, adapter, Path(folder), args.check) for command in commands]
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
    print(f"{'work':<8} {'checked':<8} {'shards':>6} {'seconds':>8} {'peak GB':>8}")
    for row in rows:
        print(
            f"{row.work:<8} {row.checked!s:<8} {row.shards:>6} {row.seconds:>8.0f} {row.peak_memory_gb:>8.2f}"
        )
    if args.json:
        write_report(
            args.json,
            rows=[asdict(row) for row in rows],
            arguments={"model": args.model, "check": args.check},
        )
    return 0


def write_adapter(folder: Path, shape: Shape) -> Path:
    """Write a bfloat16 base model and LoRA adapters with random weights; return the adapter folder."""
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
    write_files(read_auxiliary_files(base), adapter)
    return adapter


def write_base(folder: Path, model: InternVLChatModel) -> None:
    """Write a base model with random weights, shard by shard, and a small tokenizer.

    Args:
        folder: folder to create.
        model: model on the meta device, which determines the shapes.
    """
    folder.mkdir()
    save_tokenizer(train_tokenizer([Preprocessing.system_text], _VOCABULARY), folder)
    generator = torch.Generator().manual_seed(0)

    def random_weight(name: str, like: torch.Tensor) -> torch.Tensor:
        return fill(name, torch.empty(like.shape, dtype=like.dtype), model.config, generator)

    weights = {name: partial(random_weight, name, tensor) for name, tensor in model.state_dict().items()}
    write_weights(weights, folder)
    write_config(model.config, folder)


def measure(command: str, source: Path, folder: Path, check: str) -> Conversion:
    """Run a command, measure its duration and peak memory, and delete its result.

    Raises:
        RuntimeError: the command failed; the message contains the end of its output.
    """
    target = folder / command
    argv = [sys.executable, "-m", "internvl_chat.cli", command, str(source), str(target), "--device", "cpu"]
    start, peak = time.perf_counter(), 0
    with (folder / "log.txt").open("w+", encoding="utf-8") as log:
        process = psutil.Popen([*argv, "--check", check], cwd=SOURCE_ROOT, stdout=log, stderr=log)
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                peak = max(peak, process.memory_info().rss)
            time.sleep(_POLL_SECONDS)
        seconds = time.perf_counter() - start
        if process.returncode:
            log.seek(0)
            raise RuntimeError(
                f"m3llm {command} failed with exit code {process.returncode}:\n{log.read()[-3000:]}"
            )
    shards = len(weight_files(target))
    shutil.rmtree(target)
    return Conversion(command, check == "True", shards, seconds, peak / 1e9)


if __name__ == "__main__":
    sys.exit(main())
