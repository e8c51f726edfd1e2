"""Scaling of a training step with the number of records, tokens, tiles and ranks, varied one at a time.

- Records, tokens and tiles: duration and FLOPs of a forward and backward pass of one pack.
- Ranks: training throughput under torchrun.

Prints a table and optionally writes JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.common import write_report
from benchmarks.presets.recipes import RECIPES
from benchmarks.shapes import DTYPES, SHAPES, Shape, default_dtype, random_model
from internvl_chat.cli import main as m3llm
from internvl_chat.constants import IGNORE_INDEX
from internvl_chat.data.batching.collator import Pack, pack_samples
from internvl_chat.data.encode.encoder import EncodedConversation
from internvl_chat.data.encode.tiling import Grid
from internvl_chat.data.record_set import RecordKey, Sample
from internvl_chat.data.synthetic.sample_data import write_sample_data
from internvl_chat.model.attention import resolve_attention
from internvl_chat.model.flops import count_flops
from internvl_chat.model.lora.injection import add_lora
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel
from internvl_chat.train.freeze import set_trainable

IMAGE_CONTEXT = 1
SUPERVISED_SHARE = 0.11
Row = dict[str, Any]


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Example: python InternVL/benchmarks/scaling.py --model mid --recipe lora --json scaling.json",
    )
    parser.add_argument("--model", choices=SHAPES, default="mid", help="model shape (default: mid)")
    parser.add_argument("--recipe", choices=RECIPES, default="full", help="recipe (default: full)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="device (default: cuda if available)")
    parser.add_argument(
        "--repeats", type=int, default=3, help="passes per measurement; the median is reported (default: 3)"
    )
    parser.add_argument("--largest", type=int, default=4096, help="maximum tokens per pack (default: 4096)")
    parser.add_argument(
        "--processes",
        type=int,
        nargs="*",
        default=[1, 2],
        help="world sizes for training a small model on the CPU (default: 1 2)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the results as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line and return the exit code."""
    args = build_parser().parse_args(argv)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = default_dtype(device.type)
    if dtype == "float32":
        print("This CPU has no bf16 instructions: all passes use float32.")
    model = build_model(SHAPES[args.model], args.recipe, device, DTYPES[dtype])
    rows = [
        measure(model, device, quantity, number, pack, args.repeats)
        for quantity, number, pack in synthetic_packs(SHAPES[args.model], args.largest)
    ]
    rows += [measure_ranks(world_size) for world_size in args.processes]
    for row in rows:
        print("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                        for key, value in row.items()))  # fmt: skip
    if args.json:
        write_report(Path(args.json), device.type, dtype=dtype, rows=rows)
    return 0


def build_model(shape: Shape, recipe: str, device: torch.device, dtype: torch.dtype) -> InternVLChatModel:
    """Return a model with random weights, whose trainable parameters are those of a recipe."""
    attn = resolve_attention("auto", device)
    model = random_model(shape, IMAGE_CONTEXT, attn=attn, device=device, dtype=dtype)
    rank = RECIPES[recipe].lora_rank
    add_lora(model, llm_rank=rank)
    set_trainable(model, freeze_llm=rank > 0, freeze_mlp=rank > 0, freeze_backbone=True)
    return model.to(device).train()


def synthetic_packs(shape: Shape, largest: int) -> list[tuple[str, int, Pack]]:
    """Return (quantity, number, pack) triples: packs in which one quantity is doubled repeatedly."""
    per_tile = shape.config().tokens_per_tile
    tokens, record = largest // 8, largest // 8
    packs = [("tokens", n, pack_of(1, n, 0, shape)) for n in doubling(tokens, largest)]
    packs += [("records", n, pack_of(n, record, 0, shape)) for n in doubling(1, largest // record)]
    max_tiles = max(1, (largest - 64) // per_tile)
    packs += [("tiles", n, pack_of(1, max_tiles * per_tile + 64, n, shape)) for n in doubling(1, max_tiles)]
    return packs


def doubling(first: int, last: int) -> list[int]:
    """Return `first`, `2 * first`, `4 * first`, ... up to `last`.

    >>> doubling(1, 9)
    [1, 2, 4, 8]
    """
    return [first << i for i in range(64) if first << i <= last]


def pack_of(records: int, tokens: int, tiles: int, shape: Shape) -> Pack:
    """Return a pack of `records` records, each with `tokens` random tokens and `tiles` tiles."""
    config = shape.config()
    size, context = config.image_size, config.tokens_per_tile * tiles
    generator = torch.Generator().manual_seed(0)
    samples = []
    for number in range(records):
        ids = torch.randint(2, shape.vocabulary, (tokens,), generator=generator)
        ids[8 : 8 + context] = IMAGE_CONTEXT
        labels = torch.full_like(ids, IGNORE_INDEX)
        supervised = max(1, int(SUPERVISED_SHARE * (tokens - context)))
        labels[-supervised:] = ids[-supervised:]
        encoded = EncodedConversation(
            ids, labels, torch.arange(8, 8 + context), (Grid(tiles, 1, False),) * (tiles > 0)
        )
        pixels = torch.zeros(tiles, size, size, 3, dtype=torch.uint8)
        samples.append((Sample(RecordKey("synthetic", number), None, encoded, pixels), True))
    return pack_samples(samples)


def measure(
    model: InternVLChatModel, device: torch.device, quantity: str, number: int, pack: Pack, repeats: int
) -> Row:
    """Return a table row with the median duration and the FLOPs of a forward and backward pass."""
    inputs = pack.text_inputs(device)
    inputs["pixel_values"] = pack.pixel_values(device, "imagenet", model.language_model.dtype)

    def forward_backward() -> None:
        model(**inputs).loss.backward()
        model.zero_grad(set_to_none=True)

    timed(forward_backward, device)  # warm-up
    seconds = statistics.median(timed(forward_backward, device) for _ in range(repeats))
    operations = count_flops(model).step(pack.lengths.tolist(), pack.num_supervised, len(pack.tiles))
    return {
        "against": quantity,
        "number": number,
        "seconds": seconds,
        "gflop": operations / 1e9,
        "gflop_per_second": operations / 1e9 / seconds,
    }


def timed(function: Callable[[], None], device: torch.device) -> float:
    """Return the duration of a call in seconds."""
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure_ranks(world_size: int) -> Row:
    """Return a table row with the training throughput of a small model on `world_size` ranks."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_sample_data(folder / "data", train=8, held_out=1)
        m3llm(
            ["tiny-model", str(folder / "model"), "--text", str(folder / "data/train"), "--image_size", "112"]
        )
        flags = {
            "model_name_or_path": folder / "model", "meta_path": folder / "data/train.json",
            "output_dir": folder / "run", "use_cpu": True, "force_image_size": 112, "freeze_backbone": True,
            "dynamic_image_size": True, "max_steps": 9, "save_strategy": "no", "report_to": "none",
            "disable_tqdm": True, "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 16 // world_size,
        }  # fmt: skip
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(world_size)]
        command += ["-m", "internvl_chat.train.internvl_chat_finetune"]
        command += [text for key, value in flags.items() for text in (f"--{key}", str(value))]
        threads = str(max(1, (os.cpu_count() or 1) // world_size))
        source = str(Path(__file__).resolve().parents[1])
        environment = os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": threads}
        subprocess.run(command, check=True, capture_output=True, env=environment)
        rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()][1:]
    records, seconds = (sum(row[key] for row in rows) for key in ("records", "seconds"))
    return {"against": "ranks, trained", "number": world_size, "records_per_second": records / seconds}


if __name__ == "__main__":
    sys.exit(main())
