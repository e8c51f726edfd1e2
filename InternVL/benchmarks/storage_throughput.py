"""Records per second with images in a folder, in tar shards, and in object storage (a local S3 server).

    python InternVL/benchmarks/storage_throughput.py --json storage.json

The records are synthetic. The S3 server requires moto, flask, flask-cors and the extra `remote`. It runs on
the same cores as the reader and without network latency, so its rows show only the cost of the requests.
CPU seconds are those of the reader.
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import write_report
from benchmarks.data_throughput import Row, measure, print_rows
from internvl_chat.commands.common import positive
from internvl_chat.commands.output import echo
from internvl_chat.data.dataset import build_sets
from internvl_chat.data.encode.encoder import RecordEncoder
from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.data.encode.tokenizer_training import train_tokenizer
from internvl_chat.data.record_set import RecordSet
from internvl_chat.data.shard_writer import write_shards
from internvl_chat.data.sources.meta import DatasetSpec, load_meta
from internvl_chat.data.synthetic.sample_data import write_sample_data

_SERVER_PACKAGES = ("moto", "flask", "flask_cors", "s3fs", "tenacity")
_BUCKET = "figures"


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=positive, default=25, help="records per dataset (default: 25)")
    parser.add_argument("--json", type=Path, help="write the results as JSON")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        rows = storage_rows(args.records, Path(scratch))
    print_rows("images", rows)
    if args.json:
        write_report(args.json, rows=rows)
    return 0


def storage_rows(records: int, scratch: Path) -> list[Row]:
    """Return a table row for each location of the images."""
    specs = load_meta(write_sample_data(scratch / "sample", train=records, held_out=1)["train"], scratch)
    texts = (spec.annotation.read_text(encoding="utf-8") for spec in specs)
    encoder = RecordEncoder(train_tokenizer(texts, 1024), Preprocessing(max_dynamic_patch=1))
    sets = build_sets(specs, encoder)
    sharded = write_shards(
        sets, scratch / "shards", meta_name="meta.json", shard_bytes=10**9, skip_unusable=False, progress=iter
    )
    rows = [load("folder", sets), load("tar shards", build_sets(load_meta(sharded.meta, scratch), encoder))]
    missing = [name for name in _SERVER_PACKAGES if find_spec(name) is None]
    if missing:
        echo(f"no rows for object storage: {', '.join(missing)} not installed")
        return rows
    os.environ["M3LLM_CACHE"] = str(scratch / "cache")
    with s3_server(scratch):
        folders = {"objects": specs[-1].root, "shards": scratch / "shards/image-shards"}
        for name, folder in folders.items():
            upload(Path(folder), name)
            remote = build_sets(at_url(specs, f"s3://{_BUCKET}/{name}"), encoder)
            rows += [load(f"S3 {name}, first time", remote), load(f"S3 {name}, from the cache", remote)]
            shutil.rmtree(scratch / "cache")
    return rows


def at_url(specs: Sequence[DatasetSpec], url: str) -> list[DatasetSpec]:
    """Return copies of the datasets with `root` set to a URL."""
    return [replace(spec, root=url) for spec in specs]


def load(name: str, sets: Sequence[RecordSet]) -> Row:
    """Load all records in this process, as a dataloader worker does; return the table row."""
    keys = [(records, index) for records in sets for index in range(len(records))]
    return measure(name, len(keys), lambda: [len(records.load(index).tiles) for records, index in keys])


@contextmanager
def s3_server(scratch: Path) -> Iterator[None]:
    """Run moto's S3 server, and configure this process to use it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "benchmark",
        "AWS_SECRET_ACCESS_KEY": "benchmark",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with (scratch / "server.log").open("w") as log:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        while socket.socket().connect_ex(("127.0.0.1", port)):
            if process.poll() is not None:
                raise RuntimeError((scratch / "server.log").read_text())
            time.sleep(0.05)
        yield
    finally:
        process.kill()
        process.wait()


def upload(folder: Path, name: str) -> None:
    """Copy a folder to the bucket."""
    from s3fs import S3FileSystem

    files = S3FileSystem()
    files.makedirs(_BUCKET, exist_ok=True)
    files.put(f"{folder}/", f"{_BUCKET}/{name}/", recursive=True)


if __name__ == "__main__":
    sys.exit(main())
