"""Records of all datasets, with their lengths, ids and problems as far as they are indexed."""

import multiprocessing
import signal
import threading
import time
from collections.abc import Iterable, Sequence
from multiprocessing import resource_tracker
from pathlib import Path

import numpy as np

from internvl_chat.data.audit.checks import dataset_warnings
from internvl_chat.data.encode.encoder import RecordLengths
from internvl_chat.data.index.build import IndexPart, index_records
from internvl_chat.data.record_set import RecordSet
from internvl_chat.data.sources.problems import ERRORS, Problem
from internvl_chat.utils.errors import DataError
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

# A thread that is blocked longer, for example by a file system, is abandoned.
_STOP_SECONDS = 5


class Catalog:
    """The R records that training would use, numbered across all datasets.

    Args:
        sets: opened datasets.
        file_problems: problems of annotation files that could not be opened.

    Attributes:
        bounds: position of the first record of each dataset, and R.
        lengths: (5, R) int32, one row per field of `RecordLengths`.
        indexed: (R,) bool, whether lengths, ids and problems of a record are known.
        ids: printable ids.
        general: problems of whole datasets or files.
    """

    def __init__(self, sets: Sequence[RecordSet], file_problems: Sequence[Problem] = ()) -> None:
        self.sets, self.general = list(sets), list(file_problems)
        self.bounds = np.cumsum([0, *(records.num_distinct for records in sets)])
        self.lengths = np.zeros((len(RecordLengths._fields), len(self)), np.int32)
        self.indexed = np.zeros(len(self), bool)
        self.ids: list[str | None] = [None] * len(self)
        self._problems: dict[int, list[Problem]] = {}
        self._by_kind: dict[str, set[int]] = {}
        self._lock = threading.Lock()
        self._opened = [_file_state(records.spec.annotation) for records in sets]

    def __len__(self) -> int:
        return int(self.bounds[-1])

    @property
    def counts_tokens(self) -> bool:
        """Whether a tokenizer counts the tokens."""
        return any(records.encoder.tokenizer is not None for records in self.sets)

    def locate(self, position: int) -> tuple[int, int]:
        """Return the dataset number and the file index of a record."""
        set_number = int(np.searchsorted(self.bounds, position, side="right")) - 1
        return set_number, position - int(self.bounds[set_number])

    def position(self, set_number: int, index: int) -> int | None:
        """Return the position of a record; None if training does not use it."""
        used = index < self.sets[set_number].num_distinct
        return int(self.bounds[set_number]) + index if used else None

    def add(self, part: IndexPart) -> None:
        """Add indexed records; earlier results for them are replaced."""
        positions = part.records + self.bounds[part.set_number]
        with self._lock:
            for position in positions.tolist():
                for problem in self._problems.pop(position, ()):
                    self._by_kind[problem.kind].discard(position)
            self._add_problems(part.set_number, part.problems)
            for position, record_id in zip(positions.tolist(), part.ids, strict=True):
                self.ids[position] = record_id
            self.lengths[:, positions] = part.lengths.T
            self.indexed[positions] = True

    def add_warnings(self, warnings: Iterable[Problem]) -> None:
        """Add the warnings that result from comparing all records."""
        numbers = {records.spec.name: number for number, records in enumerate(self.sets)}
        found = list(warnings)
        with self._lock:
            self.general += [problem for problem in found if problem.index is None]
            for problem in found:
                if problem.index is not None:
                    self._add_problems(numbers[problem.dataset], [problem])

    def _add_problems(self, set_number: int, problems: Iterable[Problem]) -> None:
        for problem in problems:
            position = int(self.bounds[set_number]) + (problem.index or 0)
            self._problems.setdefault(position, []).append(problem)
            self._by_kind.setdefault(problem.kind, set()).add(position)

    def problems(self, position: int) -> list[Problem]:
        """Return the known problems of a record."""
        with self._lock:
            return list(self._problems.get(position, ()))

    def with_problem(self, kinds: Iterable[str]) -> np.ndarray:
        """Return the sorted positions of the records with a problem of one of these kinds."""
        with self._lock:
            found = set().union(*(self._by_kind.get(kind, ()) for kind in kinds))
            return np.sort(np.fromiter(found, np.int64, len(found)))

    def kinds(self) -> dict[str, int]:
        """Return the number of records with each kind of problem."""
        with self._lock:
            return {kind: len(positions) for kind, positions in self._by_kind.items() if positions}

    def unusable(self) -> np.ndarray:
        """Return the positions of the records that are known to be unusable."""
        return self.with_problem(ERRORS)

    def check_file(self, set_number: int) -> None:
        """Check that an annotation file is the one that was opened.

        Raises:
            DataError: the file has changed, so its records may be at other offsets.
        """
        file = self.sets[set_number].spec.annotation
        if _file_state(file) != self._opened[set_number]:
            message = "the file has changed since it was opened; restart m3llm data browse to read it again"
            raise DataError(message, file=file, kind="changed")

    def changed_files(self) -> list[Path]:
        """Return the annotation files that have changed since they were opened."""
        states = zip(self.sets, self._opened, strict=True)
        files = [(records.spec.annotation, opened) for records, opened in states]
        return [file for file, opened in files if _file_state(file) != opened]


def _file_state(file: Path) -> tuple[int, int] | None:
    """Return the size and modification time of a file; None if it is missing."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


class _Stopped(Exception):
    """The server is shutting down."""


class BackgroundIndex:
    """Thread that fills a catalog from the cache, then indexes the other records and caches the result.

    Args:
        catalog: catalog to fill.
        cache: cache folder; by default that of training.

    Attributes:
        error: why indexing failed; None while it runs, and if it succeeded or was stopped.
        finished: whether indexing has succeeded or failed.
    """

    def __init__(self, catalog: Catalog, cache: Path | None = None) -> None:
        self.catalog, self.cache = catalog, cache
        self.error: str | None = None
        self.finished = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="index", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread and its worker processes; finished datasets stay in the cache."""
        self._stop.set()
        deadline = time.monotonic() + _STOP_SECONDS
        while self._thread.is_alive() and time.monotonic() < deadline:
            for worker in multiprocessing.active_children():
                worker.terminate()
            self._thread.join(0.1)

    def wait(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()

    def _run(self) -> None:
        # Worker processes inherit the signal mask and leave Ctrl+C to the server. The start of the resource
        # tracker, which comes with the first worker, would reset the mask.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            indexes = index_records(self.catalog.sets, cache=self.cache, on_part=self._add)
            self.catalog.add_warnings(dataset_warnings(self.catalog.sets, indexes))
        except Exception as error:
            if self._stop.is_set():
                return
            self.error = str(error) or type(error).__name__
            logger.error("indexing failed: %s", self.error)
        self.finished = True

    def _add(self, part: IndexPart) -> None:
        if self._stop.is_set():
            raise _Stopped
        self.catalog.add(part)
