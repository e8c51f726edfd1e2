"""Whether a training set holds what it is to be judged by: articles and images of a benchmark."""

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from internvl_chat.data.dataset import RecordSet
from internvl_chat.data.image_hash import Fingerprint, fingerprint, near_pairs, similarity
from internvl_chat.data.jsonl import RecordFile
from internvl_chat.data.lengths import available_cores
from internvl_chat.data.meta import load_meta
from internvl_chat.data.problems import Problem, RecordProblem, show_id, show_message
from internvl_chat.errors import DataError

# Among 306 figures and panels of PubMed Central no two differ in less than 14 bits; scaled, recompressed and
# grey copies differ in at most 4. At the size of a training set chance comes nearer, hence the second look.
MOST_BITS = 8
LEAST_SIMILARITY = 0.95

_ARTICLE = re.compile(rb"(?<![A-Za-z0-9])PMC\d+")
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".tif", ".tiff", ".webp", ".bmp", ".jp2")
_LONGEST_PATH = 4096
# Starting a process takes as long as hashing some hundreds of images.
_IMAGES_PER_WORKER = 500


@dataclass
class Benchmark:
    """What must not be trained on.

    Attributes:
        articles: PMC id -> where it is named.
        images: files.
        not_found: images that are named, but are not where they were looked for.
    """

    articles: dict[str, str] = field(default_factory=dict)
    images: list[Path] = field(default_factory=list)
    not_found: list[str] = field(default_factory=list)


def read_benchmark(paths: Sequence[Path], data_root: Path) -> Benchmark:
    """Gather articles and images from folders, meta files, and JSON or JSONL files of any content.

    Images named in a JSON file are looked for in its folder, in `images` there, and in `images` beside it.

    Args:
        paths: of folders everything below is taken.
        data_root: what relative paths in meta files count from.

    Raises:
        DataError: a path does not exist, a file cannot be read, or there is nothing to compare with.
    """
    found, seen = Benchmark(), set()
    for path in paths:
        if not path.exists():
            raise DataError("no such file or folder to compare with", file=path)
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            if file.suffix.lower() in _IMAGE_SUFFIXES:
                _add_image(file, found, seen)
            elif file.suffix.lower() in (".json", ".jsonl"):
                _read_file(file, data_root, found, seen)
            elif file == path:
                raise DataError("neither images nor JSON, so nothing to compare with", file=path)
    if not found.articles and not found.images:
        raise DataError(f"no PMC ids and no images in {', '.join(map(str, paths))}")
    return found


def _add_image(file: Path, found: Benchmark, seen: set[Path]) -> None:
    if file in seen:
        return
    seen.add(file)
    found.images.append(file)
    for article in _ARTICLE.findall(os.fsencode(file.name)):
        found.articles.setdefault(article.decode(), str(file))


def _read_file(file: Path, data_root: Path, found: Benchmark, seen: set[Path]) -> None:
    """Take in a meta file, a file of records, or any other JSON."""
    if file.suffix.lower() == ".json" and (single := _read_object(file)) is not None:
        if single and all(isinstance(v, dict) and "annotation" in v for v in single.values()):
            for spec in load_meta(file, data_root):
                _read_records(spec.annotation, [spec.root], found, seen)
        else:
            _read_item(json.dumps(single).encode(), single, str(file), _near(file), found, seen)
        return
    _read_records(file, _near(file), found, seen)


def _near(file: Path) -> list[Path]:
    return [file.parent, file.parent / "images", file.parent.parent / "images"]


def _read_object(file: Path) -> dict[str, Any] | None:
    """Return what a JSON file holds if that is one object, not an array of records."""
    try:
        with file.open("rb") as stream:
            if not stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
                return None
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot be read: {error}", file=file, kind="json") from None


def _read_records(file: Path, folders: Sequence[Path], found: Benchmark, seen: set[Path]) -> None:
    records = RecordFile(file)
    for i in range(len(records)):
        place = f"{file}, line {records.line(i)}"
        _read_item(records.read(i), records[i], place, folders, found, seen)


def _read_item(
    content: bytes, item: Any, place: str, folders: Sequence[Path], found: Benchmark, seen: set[Path]
) -> None:
    for article in _ARTICLE.findall(content):
        found.articles.setdefault(article.decode(), place)
    for name in _image_names(item):
        candidates = [folder / name for folder in folders]
        file = next((path for path in candidates if _exists(path)), None)
        if file is not None:
            _add_image(file, found, seen)
        else:
            found.not_found.append(name)


def _image_names(item: Any) -> Iterator[str]:
    """Yield every text in a JSON value that is the name of an image."""
    waiting = [item]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str) and _names_image(value):
            yield value


def _names_image(text: str) -> bool:
    return len(text) < _LONGEST_PATH and "\n" not in text and text.lower().endswith(_IMAGE_SUFFIXES)


def _exists(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


class _Use(NamedTuple):
    """What a record shows and names: articles of the benchmark, and images by number."""

    set_number: int
    index: int
    id: str | None
    articles: tuple[str, ...]
    images: tuple[int, ...]


def find_leaks(
    sets: Sequence[RecordSet], benchmark: Benchmark, *, workers: int | None = None
) -> list[Problem]:
    """Return what the records that are used have in common with a benchmark, in the order of the files.

    Args:
        sets: the data sets.
        benchmark: of `read_benchmark`.
        workers: processes that look at images; by default one a core, and none beside this for few images.
    """
    numbers: dict[Path, int] = {}
    uses = list(_uses(sets, benchmark, numbers))
    images = list(numbers)
    prints = _fingerprints([*benchmark.images, *images], workers)
    matches = _match_images(images, benchmark.images, prints)
    return [problem for use in uses for problem in _problems(sets[use.set_number], use, benchmark, matches)]


def _uses(sets: Sequence[RecordSet], benchmark: Benchmark, numbers: dict[Path, int]) -> Iterator[_Use]:
    """Yield what each record shows and names; what cannot be read cannot be trained on either.

    Args:
        sets: the data sets.
        benchmark: what it is compared with.
        numbers: of the images; new ones are added.
    """
    total = sum(s.num_distinct for s in sets)
    bar = tqdm(total=total, desc="reading", unit="record", delay=2, file=sys.stderr, dynamic_ncols=True)
    with bar:
        for number, records in enumerate(sets):
            for index in range(records.num_distinct):
                bar.update()
                try:
                    content, record = records.file.read(index), records.record(index)
                    paths = records.image_paths(record) if benchmark.images else []
                except (DataError, RecordProblem):
                    continue
                named = {article.decode() for article in _ARTICLE.findall(content)}
                shared = tuple(sorted(named & benchmark.articles.keys()))
                images = tuple(numbers.setdefault(path, len(numbers)) for path in paths)
                if shared or images:
                    yield _Use(number, index, show_id(record.id), shared, images)


def _fingerprints(paths: Sequence[Path], workers: int | None) -> dict[Path, Fingerprint]:
    """Return the fingerprint of each image that can be decoded."""
    distinct = list(dict.fromkeys(paths))
    if workers is None:
        workers = min(available_cores(), 16, len(distinct) // _IMAGES_PER_WORKER)
    bar = tqdm(
        total=len(distinct), desc="comparing", unit="image", delay=2, file=sys.stderr, dynamic_ncols=True
    )
    with bar:
        return {
            path: found
            for path, found in zip(distinct, _mapped(distinct, workers), strict=True)
            if bar.update() or found is not None
        }


def _mapped(paths: Sequence[Path], workers: int) -> Iterable[Fingerprint | None]:
    if workers <= 1:
        yield from map(fingerprint, paths)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(fingerprint, paths, chunksize=32)


def _match_images(
    training: Sequence[Path], benchmark: Sequence[Path], prints: dict[Path, Fingerprint]
) -> dict[int, tuple[str, str]]:
    """Return, by the numbers of images of training, the kind of match and what it is a match with."""
    matches: dict[int, tuple[str, str]] = {}
    judged = [path for path in benchmark if path in prints]
    same = {prints[path].content: path for path in reversed(judged)}
    rest = []
    for number, path in enumerate(training):
        if path not in prints:
            continue
        if (other := same.get(prints[path].content)) is not None:
            matches[number] = ("same image", f"{path} is {other}, byte for byte")
        elif prints[path].look is not None:
            rest.append(number)
    judged = [path for path in judged if prints[path].look is not None]
    looks = np.array([prints[training[number]].look for number in rest], np.uint64)
    judged_looks = np.array([prints[path].look for path in judged], np.uint64)
    for i, j, bits in sorted(near_pairs(looks, judged_looks, MOST_BITS), key=lambda pair: pair[2]):
        number, path, other = rest[i], training[rest[i]], judged[j]
        if number not in matches and similarity(path, other) >= LEAST_SIMILARITY:
            matches[number] = ("similar image", f"{path} looks like {other} ({bits} of 64 bits differ)")
    return matches


def _problems(
    records: RecordSet, use: _Use, benchmark: Benchmark, matches: dict[int, tuple[str, str]]
) -> Iterator[Problem]:
    found: dict[str, list[str]] = {}
    for article in use.articles:
        found.setdefault("same article", []).append(f"{article} is in {benchmark.articles[article]}")
    for number in use.images:
        if number in matches:
            kind, message = matches[number]
            found.setdefault(kind, []).append(message)
    spec = records.spec
    for kind, messages in found.items():
        more = f" (and {len(messages) - 1} more)" if len(messages) > 1 else ""
        yield Problem(
            spec.name, use.index, spec.annotation, records.file.line(use.index), use.id, kind,
            show_message(messages[0] + more),
        )  # fmt: skip
