"""Whether a training set holds what it is to be judged by: articles and images of a benchmark."""

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from internvl_chat.data.audit.benchmark_files import Benchmark, articles_in, not_compared
from internvl_chat.data.audit.image_hash import Fingerprint, fingerprint, near_pairs, similarity
from internvl_chat.data.index.build import available_cores
from internvl_chat.data.record_set import RecordSet
from internvl_chat.data.sources.problems import Problem, RecordProblem, show_id, show_message
from internvl_chat.utils.errors import DataError

# Among 306 figures and panels of PubMed Central no two differ in less than 14 bits; scaled, recompressed and
# grey copies differ in at most 4. At the size of a training set chance comes nearer, hence the second look.
MOST_BITS = 8
LEAST_SIMILARITY = 0.95

# Starting a process takes as long as hashing some hundreds of images.
_IMAGES_PER_WORKER = 500


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

    Before it come warnings that name what of the benchmark could not be compared.

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
    unread = [not_compared(image, why) for image in benchmark.images if (why := prints[image].problem)]
    leaks = [problem for use in uses for problem in _problems(sets[use.set_number], use, benchmark, matches)]
    return [*benchmark.problems, *unread, *leaks]


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
                shared = tuple(sorted(articles_in(content) & benchmark.articles.keys()))
                images = tuple(numbers.setdefault(path, len(numbers)) for path in paths)
                if shared or images:
                    yield _Use(number, index, show_id(record.id), shared, images)


def _fingerprints(paths: Sequence[Path], workers: int | None) -> dict[Path, Fingerprint]:
    """Return the fingerprint of each image."""
    distinct = list(dict.fromkeys(paths))
    if workers is None:
        workers = min(available_cores(), 16, len(distinct) // _IMAGES_PER_WORKER)
    bar = tqdm(
        total=len(distinct), desc="comparing", unit="image", delay=2, file=sys.stderr, dynamic_ncols=True
    )
    found = {}
    with bar:
        for path, one in zip(distinct, _mapped(distinct, workers), strict=True):
            found[path] = one
            bar.update()
    return found


def _mapped(paths: Sequence[Path], workers: int) -> Iterator[Fingerprint]:
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
    same = {prints[path].content: path for path in reversed(benchmark)}
    rest = []
    for number, path in enumerate(training):
        if prints[path].content is None:
            continue
        if (other := same.get(prints[path].content)) is not None:
            matches[number] = ("same image", f"{path} is {other}, byte for byte")
        elif prints[path].look is not None:
            rest.append(number)
    judged = [path for path in benchmark if prints[path].look is not None]
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
