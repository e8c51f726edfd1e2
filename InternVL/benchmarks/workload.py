"""What is trained on: exactly the records of a run, in one file, so that all presets go through the same."""

import dataclasses
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from benchmarks.own_records import write_own_records
from benchmarks.shapes import Shape
from internvl_chat.data.encode.encoder import RecordEncoder
from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.data.encode.tokenizer import load_tokenizer
from internvl_chat.data.encode.tokenizer_training import save_tokenizer, train_tokenizer
from internvl_chat.data.record_set import RecordSet
from internvl_chat.data.sources.jsonl import RecordFile
from internvl_chat.data.sources.meta import DatasetSpec, load_meta
from internvl_chat.utils.errors import UsageError

_NAME = "benchmark"
_OWN_VOCABULARY = 1200


@dataclass(frozen=True)
class Size:
    """What a record costs."""

    tokens: int
    supervised: int
    tiles: int


@dataclass(frozen=True)
class Workload:
    """The records of a run, prepared in a folder.

    Attributes:
        meta: a meta file of one data set, whose records are to be used once each and in order.
        tokenizer: its folder.
        max_dynamic_patch: most tiles of a record.
        sizes: of every record.
    """

    meta: str
    tokenizer: str
    max_dynamic_patch: int
    sizes: tuple[Size, ...]

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Workload":
        """Read what `save` has written."""
        raw = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**raw, "sizes": tuple(Size(**size) for size in raw["sizes"])})

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer."""
        return load_tokenizer(Path(self.tokenizer))[0]

    def open_records(self, shape: Shape, tokenizer: PreTrainedTokenizerBase) -> RecordSet:
        """Open the records, encoded for a model of that shape."""
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
    """Choose the records and write them, with a tokenizer, into a folder.

    Args:
        folder: an empty one.
        shape: of the model.
        records: how many.
        max_dynamic_patch: most tiles of a record.
        meta: a meta file; without it the benchmark makes its own records.
        tokenizer: a folder; without it one is trained on the records' text.
        context_tokens: mean length of the context in the benchmark's own records.
    """
    source = meta or write_own_records(folder / "own", context_tokens)
    raws = take_records(load_meta(source, data_root=Path.cwd()), records)
    annotation = folder / "records.jsonl"
    annotation.write_text("".join(json.dumps(raw) + "\n" for raw in raws), encoding="utf-8")
    entry = {"root": str(folder), "annotation": str(annotation), "data_augment": False, "repeat_time": 1}
    entry["max_dynamic_patch"] = max_dynamic_patch
    (folder / "meta.json").write_text(json.dumps({_NAME: entry}), encoding="utf-8")
    if tokenizer is None:
        tokenizer = str(folder / "tokenizer")
        texts = [text for raw in raws for text in [*_texts(raw), Preprocessing.system_text]]
        save_tokenizer(train_tokenizer(texts, _OWN_VOCABULARY), Path(tokenizer))
    workload = Workload(str(folder / "meta.json"), tokenizer, max_dynamic_patch, ())
    loaded = workload.load_tokenizer()
    if len(loaded) > shape.vocabulary:
        raise UsageError(f"{tokenizer}: {len(loaded)} tokens, but the model has {shape.vocabulary}")
    opened = workload.open_records(shape, loaded)
    encoded = [opened.encode(index)[1] for index in range(len(opened))]
    sizes = tuple(Size(len(e.input_ids), e.num_supervised, e.num_tiles) for e in encoded)
    return dataclasses.replace(workload, sizes=sizes)


def take_records(specs: Sequence[DatasetSpec], count: int) -> list[dict[str, Any]]:
    """Return that many records, of each set in proportion to its size all along, images by absolute path."""
    taken: list[dict[str, Any]] = []
    rng = random.Random(0)
    while len(taken) < count:
        taken += list(_one_round(specs, rng))
    return taken[:count]


def _one_round(specs: Sequence[DatasetSpec], rng: random.Random) -> Iterator[dict[str, Any]]:
    """Yield every record once; any stretch of them has about the mix of the whole."""
    places = []
    for number, spec in enumerate(specs):
        file = RecordFile(spec.annotation)
        for position, index in enumerate(rng.sample(range(len(file)), len(file))):
            places.append(((position + rng.random()) / len(file), number, file, index))
    for _, number, file, index in sorted(places, key=lambda place: place[0]):
        yield _with_absolute_images(file[index], specs[number].root)


def _with_absolute_images(raw: dict[str, Any], root: Path) -> dict[str, Any]:
    """Return the record with its images' paths absolute."""
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
