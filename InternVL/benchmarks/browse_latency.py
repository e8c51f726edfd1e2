"""Time to open the data browser and its pages on a large dataset, before and after the index is cached.

    python InternVL/benchmarks/browse_latency.py --records 238000 --json browse.json

The records are synthetic and share their images. `opening` begins with the start of `m3llm data browse`
and ends with the first list page. It includes the imports of torch and transformers.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import write_report
from benchmarks.data_throughput import print_rows, split_evenly
from benchmarks.synthetic_records import write_synthetic_records
from internvl_chat.cli import main as m3llm
from internvl_chat.commands.common import positive
from internvl_chat.commands.output import progress
from internvl_chat.data.sources.jsonl import RecordFile

SOURCE_ROOT = Path(__file__).resolve().parents[1]
_CONTEXT_TOKENS = 200
# Name -> path of a request; LAST is replaced with the index of the last record of the smallest dataset.
REQUESTS = {
    "list page": "/",
    "last list page": "/?page=1000000",
    "record page": "/record/1/LAST",
    "tile": "/tile/1/LAST/0/0",
    "list, sorted by tokens": "/?sort=longest",
    "list, text search": "/?text=no+such+text",
    "jump to an id": "/jump?id=qa-compound-image-LAST",
}


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--records", type=positive, default=238_000, help="number of records (default: 238000)"
    )
    parser.add_argument("--model", help="model whose tokenizer is used (default: a small random model)")
    parser.add_argument("--json", type=Path, help="write the results as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line and return the exit code."""
    args = build_parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        meta, last = write_records(Path(folder), args.records)
        model = args.model or tiny_model(Path(folder))
        environment = {**os.environ, "M3LLM_CACHE": f"{folder}/cache", "PYTHONPATH": str(SOURCE_ROOT)}
        rows = [measure(name, meta, model, last, environment) for name in ("not indexed", "index cached")]
    print_rows("seconds", rows)
    if args.json:
        write_report(args.json, records=args.records, rows=rows)
    return 0


def write_records(folder: Path, total: int) -> tuple[Path, int]:
    """Write distinct records with the token and tile counts of the published datasets.

    Returns:
        The meta file, and the index of the last record of the smallest dataset.
    """
    meta = write_synthetic_records(folder / "data", _CONTEXT_TOKENS)
    entries = json.loads(meta.read_text(encoding="utf-8"))
    sizes = list(split_evenly(total, len(entries)))
    for (name, entry), size in zip(entries.items(), sizes, strict=True):
        sources = list(RecordFile(Path(entry["annotation"])))
        file = folder / f"{name}.jsonl"
        with file.open("w", encoding="utf-8") as stream:
            for number in range(size):
                record = {"id": f"{name}-{number}", **sources[number % len(sources)]}
                question, *answers = record["conversations"]
                question = {**question, "value": f"{question['value']} {number}"}
                stream.write(json.dumps({**record, "conversations": [question, *answers]}) + "\n")
        entry["annotation"] = str(file)
    meta.write_text(json.dumps(entries), encoding="utf-8")
    return meta, min(sizes) - 1


def tiny_model(folder: Path) -> str:
    """Create a small model whose tiles have 448 pixels and 256 tokens; return its folder."""
    path = folder / "model"
    texts = folder / "data"
    shape = "--image_size 448 --vision_width 32 --width 48 --layers 2 --heads 4 --kv_heads 2"
    assert m3llm(["tiny-model", str(path), "--text", str(texts), *shape.split()]) == 0
    return str(path)


def measure(name: str, meta: Path, model: str, last: int, environment: dict[str, str]) -> dict[str, Any]:
    """Start the browser, measure all requests, and wait until the index is complete."""
    row: dict[str, Any] = {"name": name}
    start = time.perf_counter()
    with browse(meta, model, environment) as url:
        fetch(url)
        row["opening"] = elapsed(start)
        for request, path in progress(REQUESTS.items(), unit="request"):
            begin = time.perf_counter()
            fetch(url + path.replace("LAST", str(last)))
            row[request] = elapsed(begin)
        while not json.loads(fetch(f"{url}/status"))["finished"]:
            time.sleep(0.2)
        row["index complete"] = elapsed(start)
    return row


def elapsed(start: float) -> float:
    """Return the seconds since `start`."""
    return round(time.perf_counter() - start, 3)


def fetch(url: str) -> bytes:
    """Return the body of a response."""
    with urllib.request.urlopen(url) as response:
        return response.read()


@contextlib.contextmanager
def browse(meta: Path, model: str, environment: dict[str, str]) -> Iterator[str]:
    """Run `m3llm data browse` and provide its URL."""
    command = [sys.executable, "-m", "internvl_chat.cli", "data", "browse", str(meta), "--model", model]
    process = subprocess.Popen([*command, "--port", "0"], env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        yield next(match[0] for line in lines if (match := re.search(r"http://[\d.:]+", line)))
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


if __name__ == "__main__":
    sys.exit(main())
