"""Benchmark contamination: training records that share articles or images with a benchmark."""

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from internvl_chat.data.audit.benchmark_files import Benchmark, find_articles, not_compared
from internvl_chat.data.audit.image_hash import Fingerprint, fingerprint, near_pairs, similarity
from internvl_chat.data.record_set import RecordSet
from internvl_chat.data.sources.images import ImageLocation
from internvl_chat.data.sources.problems import Problem, RecordError, printable_id, printable_message
from internvl_chat.data.storage.stores import StoredImage
from internvl_chat.utils.errors import DataError
from internvl_chat.utils.hardware import cpu_cores

# Among 306 figures and panels from PubMed Central, any two differ in at least 14 bits; scaled, recompressed
# and grayscale copies differ in at most 4. In a large training set, hashes may match by chance; the
# similarity threshold rejects these pairs.
MAX_DIFFERENT_BITS = 8
MIN_SIMILARITY = 0.95

# Starting a process takes as long as hashing several hundred images.
_IMAGES_PER_WORKER = 500


class _Content(NamedTuple):
    """Benchmark articles mentioned in a training record, and the numbers of the record's images."""

    dataset: int
    index: int  # type: ignore[assignment]  # hides tuple.index
    id: str | None
    articles: tuple[str, ...]
    images: tuple[int, ...]


def find_leaks(
    sets: Sequence[RecordSet], benchmark: Benchmark, *, workers: int | None = None
) -> list[Problem]:
    """Return a problem for each used record that shares articles or images with a benchmark.

    A record has at most one problem of each kind. Problems are in file order, after the warnings about parts
    of the benchmark that could not be compared.

    Args:
        sets: the training datasets.
        benchmark: result of `read_benchmark`.
        workers: number of processes that hash images; by default up to one per core, depending on the number
            of images.
    """
    numbers: dict[ImageLocation, int] = {}
    contents = list(_read_contents(sets, benchmark, numbers))
    images = list(numbers)
    fingerprints = _fingerprints([*benchmark.images, *images], workers)
    matches = _match_images(images, benchmark.images, fingerprints)
    unread = [
        not_compared(Path(image.name), f"{image}: {problem}")
        if isinstance(image, StoredImage)
        else not_compared(image, problem)
        for image in benchmark.images
        if (problem := fingerprints[image].problem)
    ]
    leaks = (_leaks(sets[content.dataset], content, benchmark, matches) for content in contents)
    return [*benchmark.problems, *unread, *chain.from_iterable(leaks)]


def _read_contents(
    sets: Sequence[RecordSet], benchmark: Benchmark, numbers: dict[ImageLocation, int]
) -> Iterator[_Content]:
    """Yield the benchmark articles and the image numbers of each record.

    Unusable records are skipped, and so are records without benchmark articles and images. If the benchmark
    has no images, the images of the records are ignored.

    Args:
        numbers: image path -> number; new images are added.
    """
    total = sum(s.num_distinct for s in sets)
    bar = tqdm(
        total=total, desc="reading", unit="record", delay=2, file=sys.stderr, dynamic_ncols=True, disable=None
    )
    with bar:
        for dataset, records in enumerate(sets):
            for index in range(records.num_distinct):
                bar.update()
                try:
                    content, record = records.file.read(index), records.record(index)
                    paths = records.image_paths(record) if benchmark.images else []
                except (DataError, RecordError):
                    continue
                shared = tuple(sorted(find_articles(content) & benchmark.articles.keys()))
                images = tuple(numbers.setdefault(path, len(numbers)) for path in paths)
                if shared or images:
                    yield _Content(dataset, index, printable_id(record.id), shared, images)


def _fingerprints(paths: Sequence[ImageLocation], workers: int | None) -> dict[ImageLocation, Fingerprint]:
    distinct = list(dict.fromkeys(paths))
    if workers is None:
        workers = min(cpu_cores(), 16, len(distinct) // _IMAGES_PER_WORKER)
    hashes = tqdm(
        _hash_images(distinct, workers), total=len(distinct), desc="comparing", unit="image", delay=2,
        file=sys.stderr, dynamic_ncols=True, disable=None,
    )  # fmt: skip
    return dict(zip(distinct, hashes, strict=True))


def _hash_images(paths: Sequence[ImageLocation], workers: int) -> Iterator[Fingerprint]:
    if workers <= 1:
        yield from map(fingerprint, paths)
    elif any(isinstance(path, StoredImage) for path in paths):
        with ThreadPoolExecutor(workers) as threads:  # each process would need a copy of the store's index
            yield from threads.map(fingerprint, paths)
    else:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            yield from pool.map(fingerprint, paths, chunksize=32)


def _match_images(
    training: Sequence[ImageLocation],
    benchmark: Sequence[ImageLocation],
    fingerprints: dict[ImageLocation, Fingerprint],
) -> dict[int, tuple[str, str]]:
    """Return the (kind, message) of each matching training image, keyed by its number."""
    matches: dict[int, tuple[str, str]] = {}
    same_content = {fingerprints[path].content: path for path in reversed(benchmark)}
    candidates = []
    for number, path in enumerate(training):
        if fingerprints[path].content is None:
            continue
        if (copy := same_content.get(fingerprints[path].content)) is not None:
            matches[number] = ("same image", f"{path} is identical to {copy}")
        elif fingerprints[path].look is not None:
            candidates.append(number)
    decoded = [path for path in benchmark if fingerprints[path].look is not None]
    looks = np.array([fingerprints[training[number]].look for number in candidates], np.uint64)
    benchmark_looks = np.array([fingerprints[path].look for path in decoded], np.uint64)
    pairs = near_pairs(looks, benchmark_looks, MAX_DIFFERENT_BITS)
    for i, j, bits in sorted(pairs, key=lambda pair: pair[2]):
        number, path, copy = candidates[i], training[candidates[i]], decoded[j]
        if number not in matches and similarity(path, copy) >= MIN_SIMILARITY:
            matches[number] = ("similar image", f"{path} looks like {copy} ({bits} of 64 bits differ)")
    return matches


def _leaks(
    records: RecordSet, content: _Content, benchmark: Benchmark, matches: dict[int, tuple[str, str]]
) -> Iterator[Problem]:
    by_kind: dict[str, list[str]] = {}
    for article in content.articles:
        by_kind.setdefault("same article", []).append(f"{article} is in {benchmark.articles[article]}")
    for number in content.images:
        if number in matches:
            kind, message = matches[number]
            by_kind.setdefault(kind, []).append(message)
    spec = records.spec
    for kind, messages in by_kind.items():
        more = f" (and {len(messages) - 1} more)" if len(messages) > 1 else ""
        yield Problem(
            spec.name, content.index, spec.annotation, records.file.line(content.index), content.id, kind,
            printable_message(messages[0] + more),
        )  # fmt: skip
