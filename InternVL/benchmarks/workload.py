"""Training records of a benchmark, written to one file so that all presets train on the same records."""

import dataclasses
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from benchmarks.shapes import Shape
from benchmarks.synthetic_records import write_synthetic_records
from internvl_chat.data.encode.encoder import RecordEncoder
from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.data.encode.tokenizer import load_tokenizer
from internvl_chat.data.encode.tokenizer_training import save_tokenizer, train_tokenizer
from internvl_chat.data.record_set import RecordSet
from internvl_chat.data.sources.jsonl import RecordFile
from internvl_chat.data.sources.meta import DatasetSpec, load_meta
from internvl_chat.utils.errors import UsageError

_NAME = "benchmark"
_TOKENIZER_VOCABULARY = 1200


@dataclass(frozen=True)
class Size:
    """Token and tile counts of a record."""

    tokens: int
    supervised: int
    tiles: int


@dataclass(frozen=True)
class Workload:
    """Prepared records and tokenizer of a benchmark.

    Attributes:
        meta: meta file with a single dataset; each record is used once, in file order.
        tokenizer: folder of the tokenizer.
        max_dynamic_patch: maximum tiles per record.
        sizes: token and tile counts of each record.
    """

    meta: str
    tokenizer: str
    max_dynamic_patch: int
    sizes: tuple[Size, ...]

    def save(self, path: Path) -> None:
        """Write the workload to a JSON file."""
        path.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Workload":
        """Read a workload written by `save`."""
        raw = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**raw, "sizes": tuple(Size(**size) for size in raw["sizes"])})

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer."""
        return load_tokenizer(Path(self.tokenizer))[0]

    def open_records(self, shape: Shape, tokenizer: PreTrainedTokenizerBase) -> RecordSet:
        """Open the records with the preprocessing of a model of the given shape."""
        (spec,) = load_meta(self.meta, data_root=Path.cwd())
        return RecordSet(spec, RecordEncoder(tokenizer, Preprocessing.from_model_config(shape.config())))


def prepare_workload(
    folder: Path,
    shape: Shape,
    *,
    records: int,
    max_dynamic_patch: int,
    meta: str | None = None,
    tokenizer: str | None = None,
    context_tokens: int = 0,
) -> Workload:
    """Sample records, write them to a folder with a tokenizer, and return the workload.

    Args:
        folder: empty folder.
        shape: model shape.
        records: number of records.
        max_dynamic_patch: maximum tiles per record.
        meta: meta file to sample from (default: synthetic records).
        tokenizer: tokenizer folder (default: train a tokenizer on the records).
        context_tokens: mean context length of synthetic records.

    Raises:
        UsageError: the vocabulary of the tokenizer is larger than that of the model.
    """
    source = meta or write_synthetic_records(folder / "synthetic", context_tokens)
    raws = take_records(load_meta(source, data_root=Path.cwd()), records)
    annotation = folder / "records.jsonl"
    annotation.write_text("".join(json.dumps(raw) + "\n" for raw in raws), encoding="utf-8")
    entry = {"root": str(folder), "annotation": str(annotation), "data_augment": False, "repeat_time": 1}
    entry["max_dynamic_patch"] = max_dynamic_patch
    (folder / "meta.json").write_text(json.dumps({_NAME: entry}), encoding="utf-8")
    if tokenizer is None:
        tokenizer = str(folder / "tokenizer")
        texts = [text for raw in raws for text in [*_texts(raw), Preprocessing.system_text]]
        save_tokenizer(train_tokenizer(texts, _TOKENIZER_VOCABULARY), Path(tokenizer))
    workload = Workload(str(folder / "meta.json"), tokenizer, max_dynamic_patch, ())
    loaded = workload.load_tokenizer()
    if len(loaded) > shape.vocabulary:
        raise UsageError(
            f"{tokenizer}: the vocabulary has {len(loaded)} tokens, more than that of the model "
            f"({shape.vocabulary})"
        )
    opened = workload.open_records(shape, loaded)
    encoded = [opened.encode(index)[1] for index in range(len(opened))]
    sizes = tuple(Size(len(e.input_ids), e.num_supervised, e.num_tiles) for e in encoded)
    return dataclasses.replace(workload, sizes=sizes)


def take_records(specs: Sequence[DatasetSpec], count: int) -> list[dict[str, Any]]:
    """Return `count` records with absolute image paths, in an order that mixes the datasets evenly."""
    taken: list[dict[str, Any]] = []
    rng = random.Random(0)
    while len(taken) < count:
        taken += list(_interleave(specs, rng))
    return taken[:count]


def _interleave(specs: Sequence[DatasetSpec], rng: random.Random) -> Iterator[dict[str, Any]]:
    """Yield each record once, with the datasets interleaved in proportion to their sizes."""
    ordered = []
    for number, spec in enumerate(specs):
        file = RecordFile(spec.annotation)
        for position, index in enumerate(rng.sample(range(len(file)), len(file))):
            ordered.append(((position + rng.random()) / len(file), number, file, index))
    for _, number, file, index in sorted(ordered, key=lambda entry: entry[0]):
        yield _with_absolute_images(file[index], specs[number].root)


def _with_absolute_images(raw: dict[str, Any], root: Path) -> dict[str, Any]:
    """Return a record with absolute image paths."""
    out = dict(raw)
    for key in ("image", "images"):
        if isinstance(out.get(key), str):
            out[key] = str(root / out[key])
        elif out.get(key):
            out[key] = [str(root / name) for name in out[key]]
    return out


def _texts(raw: dict[str, Any]) -> list[str]:
    return [
        message["value"] for message in raw.get("conversations", ()) if isinstance(message.get("value"), str)
    ]
