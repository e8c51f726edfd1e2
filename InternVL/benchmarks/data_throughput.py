"""How many records a second each stage of the data path manages, and what the length index costs.

    python InternVL/benchmarks/data_throughput.py --index-records 238000 --json data.json

Without `--meta` the records are a sample set that is made on the spot. The CPU seconds are those of all
processes; they tell more than the clock where other programs run beside.
"""

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from benchmarks.report import write_report
from internvl_chat.commands.common import positive
from internvl_chat.commands.output import print_table, progress, say
from internvl_chat.data.batching.collator import PackDataset
from internvl_chat.data.dataset import SampleIndex, TrainingData, build_sets
from internvl_chat.data.encode.encoder import RecordEncoder
from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.data.encode.tokenizer import load_tokenizer
from internvl_chat.data.encode.tokenizer_training import train_tokenizer
from internvl_chat.data.index.build import index_lengths
from internvl_chat.data.record_set import RecordSet
from internvl_chat.data.sources.jsonl import RecordFile
from internvl_chat.data.sources.meta import DatasetSpec, load_meta
from internvl_chat.data.synthetic.sample_data import write_sample_data
from internvl_chat.utils.errors import DataError

Row = dict[str, Any]


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--meta", type=Path, help="meta file of real records [a sample set]")
    parser.add_argument("--data_root", type=Path, default=Path.cwd(), help="of the meta's paths [here]")
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer [one trained on the sample]")
    parser.add_argument("--max_dynamic_patch", type=positive, default=12, help="most tiles a record [12]")
    parser.add_argument("--records", type=positive, default=25, help="records of each data set [25]")
    parser.add_argument(
        "--loader-workers",
        type=int,
        nargs="*",
        default=[0, 1, 2],
        help="dataloader worker counts to run [0 1 2]",
    )
    parser.add_argument("--index-records", type=positive, help="repeat the records to so many for the index")
    parser.add_argument("--index-workers", type=positive, help="processes that index [one a core]")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # as in training
    with tempfile.TemporaryDirectory() as scratch:
        specs, tokenizer = open_data(args, Path(scratch))
        encoder = RecordEncoder(tokenizer, Preprocessing(max_dynamic_patch=args.max_dynamic_patch))
        # First, so that the peak memory is the index's own.
        index = index_rows(specs, encoder, args.index_records, args.index_workers, Path(scratch))
        sets = build_sets(specs, encoder)
        picked = [(records, i) for records in sets for i in records.first(args.records)]
        stages = stage_rows(picked) + loader_rows(sets, args.records, args.loader_workers)
    print_rows("stage", stages)
    say()
    print_rows("length index", index)
    if args.json:
        write_report(args.json, max_dynamic_patch=args.max_dynamic_patch, stages=stages, index=index)
    return 0


def open_data(args: argparse.Namespace, scratch: Path) -> tuple[list[DatasetSpec], PreTrainedTokenizerBase]:
    """Return the data sets and the tokenizer, made in `scratch` where the command line names none."""
    meta = args.meta or write_sample_data(scratch / "sample", train=args.records, held_out=1)["train"]
    specs = load_meta(meta, args.data_root)
    if args.tokenizer:
        return specs, load_tokenizer(args.tokenizer)[0]
    texts = (spec.annotation.read_text(encoding="utf-8") for spec in specs)
    return specs, train_tokenizer(texts, 1024)


def measure(name: str, records: int, work: Callable[[], Any]) -> Row:
    """Return what some work on that many records takes, by the clock and of all processes' CPU time."""
    clock, cpu = time.perf_counter(), cpu_seconds()
    work()
    seconds = time.perf_counter() - clock
    return {
        "name": name,
        "records": records,
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu_seconds() - cpu, 3),
        "records_per_second": round(records / seconds, 1),
    }


def cpu_seconds() -> float:
    """Return the CPU time of this process and of the children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def stage_rows(picked: list[tuple[RecordSet, int]]) -> list[Row]:
    """Measure each stage of the way of a record in this process."""
    encoder = picked[0][0].encoder
    parsed = [(records, i, records.record(i)) for records, i in picked]
    paths = [records.spec.root / name for records, _, record in parsed for name in record.images]
    decoded = [records.images(i, record) for records, i, record in parsed]
    grids = [records.encode(i)[1].grids for records, i in picked]
    stages: dict[str, Callable[[], Any]] = {
        "parse": lambda: [records.record(i) for records, i in picked],
        "image headers": lambda: [image_size(path) for path in paths],
        "tokenise": lambda: [encoder.template.measure(record.messages) for _, _, record in parsed],
        "measure (the above)": lambda: [records.measure(i) for records, i in picked],
        "encode whole": lambda: [records.encode(i) for records, i in picked],
        "decode images": lambda: [len(records.images(i, record)) for records, i, record in parsed],
        "cut tiles": lambda: [len(encoder.tiles(*pair)) for pair in zip(decoded, grids, strict=True)],
        "load (all)": lambda: [len(records.load(i).tiles) for records, i in picked],
    }
    return [measure(name, len(picked), work) for name, work in progress(stages.items(), unit="stage")]


def image_size(path: Path) -> tuple[int, int]:
    """Return the size in an image's header."""
    with Image.open(path) as image:
        return image.size


def loader_rows(sets: list[RecordSet], records: int, workers: list[int]) -> list[Row]:
    """Measure a second pass of the training's loader, a record a pack, whose processes have then started."""
    specs = [replace(s.spec, repeat_time=min(1, records / len(s))) for s in sets]
    data = TrainingData(build_sets(specs, sets[0].encoder))
    rows = []
    for count in workers:
        loader = DataLoader(
            PackDataset(data),
            sampler=[[SampleIndex(i, epoch=0)] for i in range(len(data))],
            batch_size=None,
            num_workers=count,
            persistent_workers=count > 0,
            worker_init_fn=one_thread,
            generator=torch.Generator(),
        )
        go_through(loader)
        row = measure(f"loader, {count} workers", len(data), lambda loader=loader: go_through(loader))
        # Those of its processes are known only when they have ended.
        rows.append({**row, "cpu_seconds": None} if count else row)
    return rows


def one_thread(worker: int) -> None:
    """Keep a dataloader worker to one core, as training does."""
    torch.set_num_threads(1)


def go_through(loader: DataLoader) -> None:
    """Fetch everything.

    Raises:
        DataError: a record cannot be used.
    """
    for pack in loader:
        if isinstance(pack, DataError):
            raise pack


def index_rows(
    specs: list[DatasetSpec], encoder: RecordEncoder, records: int | None, workers: int | None, scratch: Path
) -> list[Row]:
    """Measure the length index, the first time and from its cache."""
    if records:
        specs = [
            repeated(spec, share, scratch)
            for spec, share in zip(specs, shares(records, len(specs)), strict=True)
        ]
    sets = build_sets(specs, encoder)
    rows = []
    for name in ("first time", "from cache"):
        row = measure(
            name,
            sum(records.num_distinct for records in sets),
            lambda: index_lengths(sets, workers=workers, cache=scratch / "cache"),
        )
        rows.append({**row, **peak_memory()})
    return rows


def shares(total: int, parts: int) -> Iterator[int]:
    """Yield a total in nearly equal parts."""
    yield from ((i + 1) * total // parts - i * total // parts for i in range(parts))


def repeated(spec: DatasetSpec, number: int, scratch: Path) -> DatasetSpec:
    """Return a data set of that many records, those of another one after the other, again and again."""
    source = RecordFile(spec.annotation)
    annotation = scratch / f"{spec.annotation.stem}.jsonl"
    with annotation.open("wb") as stream:
        stream.writelines(source.read(i % len(source)) + b"\n" for i in range(number))
    return replace(spec, annotation=annotation, repeat_time=1, length=None)


def peak_memory() -> Row:
    """Return the most memory that this process, and that any ended child, has held, in megabytes."""
    peaks = {"peak_mb": resource.RUSAGE_SELF, "peak_mb_worker": resource.RUSAGE_CHILDREN}
    return {name: resource.getrusage(who).ru_maxrss // 1024 for name, who in peaks.items()}


def print_rows(title: str, rows: list[Row]) -> None:
    """Print figures as a table."""
    header = [title if key == "name" else key.replace("_", " ") for key in rows[0]]
    print_table(header, [["-" if value is None else value for value in row.values()] for row in rows])


if __name__ == "__main__":
    sys.exit(main())
