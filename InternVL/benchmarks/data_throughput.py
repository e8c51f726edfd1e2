"""Throughput of each stage of the data pipeline, and time and memory needed to build the length index.

    python InternVL/benchmarks/data_throughput.py --index-records 238000 --json data.json

Without `--meta`, the records are synthetic. CPU seconds are summed over all processes. On a shared machine,
they are more reliable than wall time.
"""

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from benchmarks.common import write_report
from internvl_chat.commands.common import positive
from internvl_chat.commands.output import echo, print_table, progress
from internvl_chat.data.batching.collator import PackDataset
from internvl_chat.data.dataset import SampleIndex, TrainingData, build_sets
from internvl_chat.data.encode.encoder import RecordEncoder
from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.data.encode.tokenizer import load_tokenizer
from internvl_chat.data.encode.tokenizer_training import train_tokenizer
from internvl_chat.data.index.build import index_records
from internvl_chat.data.record_set import RecordSet
from internvl_chat.data.sources.jsonl import RecordFile
from internvl_chat.data.sources.meta import DatasetSpec, load_meta
from internvl_chat.data.synthetic.sample_data import write_sample_data
from internvl_chat.utils.errors import DataError

Row = dict[str, Any]


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--meta", type=Path, help="meta file of real records (default: synthetic)")
    parser.add_argument(
        "--data_root",
        type=Path,
        default=Path.cwd(),
        help="base folder of relative paths in the meta file (default: current folder)",
    )
    parser.add_argument(
        "--tokenizer", type=Path, help="tokenizer folder (default: train a tokenizer on the records)"
    )
    parser.add_argument(
        "--max_dynamic_patch", type=positive, default=12, help="maximum tiles per record (default: 12)"
    )
    parser.add_argument("--records", type=positive, default=25, help="records per dataset (default: 25)")
    parser.add_argument(
        "--loader-workers",
        type=int,
        nargs="*",
        default=[0, 1, 2],
        help="numbers of dataloader workers to measure (default: 0 1 2)",
    )
    parser.add_argument(
        "--index-records",
        type=positive,
        help="number of records in the index; records are repeated as needed (default: each record once)",
    )
    parser.add_argument(
        "--index-workers", type=positive, help="worker processes of the index (default: one per core)"
    )
    parser.add_argument("--json", type=Path, help="write the results as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line and return the exit code."""
    args = build_parser().parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # as in training
    with tempfile.TemporaryDirectory() as scratch:
        specs, tokenizer = open_data(args, Path(scratch))
        encoder = RecordEncoder(tokenizer, Preprocessing(max_dynamic_patch=args.max_dynamic_patch))
        # Measure the index first: afterwards, the peak memory would include the other stages.
        index = index_rows(specs, encoder, args.index_records, args.index_workers, Path(scratch))
        sets = build_sets(specs, encoder)
        selected = [(records, i) for records in sets for i in records.first(args.records)]
        stages = stage_rows(selected) + dataloader_rows(sets, args.records, args.loader_workers)
    print_rows("stage", stages)
    echo()
    print_rows("length index", index)
    if args.json:
        write_report(args.json, max_dynamic_patch=args.max_dynamic_patch, stages=stages, index=index)
    return 0


def open_data(args: argparse.Namespace, scratch: Path) -> tuple[list[DatasetSpec], PreTrainedTokenizerBase]:
    """Return the datasets and the tokenizer; create those that are not given on the command line."""
    meta = args.meta or write_sample_data(scratch / "sample", train=args.records, held_out=1)["train"]
    specs = load_meta(meta, args.data_root)
    if args.tokenizer:
        return specs, load_tokenizer(args.tokenizer)[0]
    texts = (spec.annotation.read_text(encoding="utf-8") for spec in specs)
    return specs, train_tokenizer(texts, 1024)


def measure(name: str, records: int, work: Callable[[], Any]) -> Row:
    """Call `work` and return a table row with its wall time, CPU time and throughput.

    Args:
        name: name of the row.
        records: number of records that `work` processes.
    """
    start, cpu = time.perf_counter(), cpu_seconds()
    work()
    seconds = time.perf_counter() - start
    return {
        "name": name,
        "records": records,
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu_seconds() - cpu, 3),
        "records_per_second": round(records / seconds, 1),
    }


def cpu_seconds() -> float:
    """Return the CPU time of this process and its terminated children."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def stage_rows(selected: list[tuple[RecordSet, int]]) -> list[Row]:
    """Return a table row for each stage of the data pipeline, measured in this process."""
    encoder = selected[0][0].encoder
    parsed = [(records, i, records.record(i)) for records, i in selected]
    paths = [records.spec.root / name for records, _, record in parsed for name in record.images]
    decoded = [records.images(i, record) for records, i, record in parsed]
    grids = [records.encode(i)[1].grids for records, i in selected]
    stages: dict[str, Callable[[], Any]] = {
        "parse": lambda: [records.record(i) for records, i in selected],
        "image headers": lambda: [image_size(path) for path in paths],
        "tokenize": lambda: [encoder.template.tokenize(record.messages) for _, _, record in parsed],
        "compute lengths (all of the above)": lambda: [records.measure(i) for records, i in selected],
        "encode": lambda: [records.encode(i) for records, i in selected],
        "decode images": lambda: [len(records.images(i, record)) for records, i, record in parsed],
        "split into tiles": lambda: [len(encoder.tiles(*pair)) for pair in zip(decoded, grids, strict=True)],
        "load (all)": lambda: [len(records.load(i).tiles) for records, i in selected],
    }
    return [measure(name, len(selected), work) for name, work in progress(stages.items(), unit="stage")]


def image_size(path: Path) -> tuple[int, int]:
    """Return the size of an image from its header."""
    with Image.open(path) as image:
        return image.size


def dataloader_rows(sets: list[RecordSet], records: int, workers: list[int]) -> list[Row]:
    """Return a table row per number of dataloader workers, with one record per pack.

    The first pass over the data starts the workers and is not timed.
    """
    specs = [replace(s.spec, repeat_time=min(1, records / len(s))) for s in sets]
    data = TrainingData(build_sets(specs, sets[0].encoder))
    rows = []
    for count in workers:
        dataloader = DataLoader(
            PackDataset(data),
            sampler=[[SampleIndex(i, epoch=0)] for i in range(len(data))],
            batch_size=None,
            num_workers=count,
            persistent_workers=count > 0,
            worker_init_fn=use_one_thread,
            generator=torch.Generator(),
        )
        iterate(dataloader)
        row = measure(f"dataloader, {count} workers", len(data), partial(iterate, dataloader))
        # The CPU time of workers is known only after they have terminated.
        rows.append({**row, "cpu_seconds": None} if count else row)
    return rows


def use_one_thread(worker: int) -> None:
    """Limit a dataloader worker to one thread, as in training."""
    torch.set_num_threads(1)


def iterate(dataloader: DataLoader) -> None:
    """Fetch all packs of a dataloader.

    Raises:
        DataError: a record is unusable.
    """
    for pack in dataloader:
        if isinstance(pack, DataError):
            raise pack


def index_rows(
    specs: list[DatasetSpec], encoder: RecordEncoder, records: int | None, workers: int | None, scratch: Path
) -> list[Row]:
    """Return table rows for the length index: built for the first time, and read from its cache.

    Args:
        specs: datasets.
        encoder: record encoder.
        records: number of records in the index; records are repeated as needed. None: each record once.
        workers: number of worker processes (default: one per core).
        scratch: folder for repeated records and the cache.
    """
    if records:
        specs = [
            repeat_records(spec, count, scratch)
            for spec, count in zip(specs, split_evenly(records, len(specs)), strict=True)
        ]
    sets = build_sets(specs, encoder)
    rows = []
    for name in ("first time", "from cache"):
        row = measure(
            name,
            sum(records.num_distinct for records in sets),
            lambda: index_records(sets, workers=workers, cache=scratch / "cache"),
        )
        rows.append({**row, **peak_memory()})
    return rows


def split_evenly(total: int, parts: int) -> Iterator[int]:
    """Yield `parts` integers of nearly equal size whose sum is `total`."""
    yield from ((i + 1) * total // parts - i * total // parts for i in range(parts))


def repeat_records(spec: DatasetSpec, number: int, scratch: Path) -> DatasetSpec:
    """Return a dataset that repeats the records of `spec` until it has `number` records."""
    source = RecordFile(spec.annotation)
    annotation = scratch / f"{spec.annotation.stem}.jsonl"
    with annotation.open("wb") as stream:
        stream.writelines(source.read(i % len(source)) + b"\n" for i in range(number))
    return replace(spec, annotation=annotation, repeat_time=1, length=None)


def peak_memory() -> Row:
    """Return the peak memory of this process and of the largest terminated child, in MB."""
    peaks = {"peak_mb": resource.RUSAGE_SELF, "peak_mb_worker": resource.RUSAGE_CHILDREN}
    return {name: resource.getrusage(who).ru_maxrss // 1024 for name, who in peaks.items()}


def print_rows(title: str, rows: list[Row]) -> None:
    """Print rows as a table."""
    header = [title if key == "name" else key.replace("_", " ") for key in rows[0]]
    print_table(header, [["-" if value is None else value for value in row.values()] for row in rows])


if __name__ == "__main__":
    sys.exit(main())
