"""Held-out records that are training records too: the same conversation with the same images."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cache
from pathlib import Path

from internvl_chat.data.dataset import TrainingData
from internvl_chat.data.record_set import RecordKey
from internvl_chat.data.sources.problems import RecordError
from internvl_chat.data.sources.records import Record
from internvl_chat.utils.errors import DataError
from internvl_chat.utils.files import file_sha256, sha256
from internvl_chat.utils.logging import get_logger
from internvl_chat.utils.text import counted

logger = get_logger(__name__)


def warn_about_overlap(training: TrainingData, eval_data: TrainingData) -> None:
    """Log how many records of each held-out dataset are training records, with the first of them."""
    sets = {records.spec.name: records for records in training.sets}
    pairs = list(repeated_records(training, eval_data))
    for number, records in enumerate(eval_data.sets):
        name = records.spec.name
        found = [pair for pair in pairs if pair[0].dataset == name]
        if not found:
            continue
        (_, index), (train_name, train_index) = found[0]
        first = f"{records.spec.annotation}, line {records.file.line(index)}"
        other = f"{sets[train_name].spec.annotation}, line {sets[train_name].file.line(train_index)}"
        logger.warning(
            "validation: %d of the %s in %s also occur in the training data (same conversation and images; "
            "for example, %s = %s). Their loss does not measure generalization; remove them from one of the "
            "two sets",
            len(found), counted(len(eval_data.indices(number)), "record"), name, first, other,
        )  # fmt: skip


def repeated_records(
    training: TrainingData, eval_data: TrainingData
) -> Iterator[tuple[RecordKey, RecordKey]]:
    """Yield each held-out record that is used for training, and the first training record that equals it.

    Images are compared by content, so that a copy under another name is found. Only the images of records
    with the same conversation and the same sizes of image files are read.
    """
    candidates: dict[Hashable, list[tuple[RecordKey, list[Path]]]] = defaultdict(list)
    for key, outline, paths in _outlines(eval_data):
        candidates[outline].append((key, paths))
    first: dict[RecordKey, RecordKey] = {}
    digest = cache(file_sha256)
    for key, outline, paths in _outlines(training):
        for held_key, held_paths in candidates.get(outline, ()):
            if held_key not in first and _same_files(paths, held_paths, digest):
                first[held_key] = key
    yield from sorted(first.items())


def _outlines(data: TrainingData) -> Iterator[tuple[RecordKey, Hashable, list[Path]]]:
    """Yield the key, the messages with the sizes of the images, and the images of each used record."""
    for number, records in enumerate(data.sets):
        for index in data.indices(number).tolist():
            try:
                record = records.record(index)
                paths = records.image_paths(record)
                yield RecordKey(records.spec.name, index), _outline(record, paths), paths
            except (DataError, RecordError, OSError):
                continue  # reported when it is used


def _outline(record: Record, paths: Sequence[Path]) -> Hashable:
    text = "\0".join(f"{message.role}:{message.content.strip()}" for message in record.messages)
    return sha256(text.encode("utf-8", "surrogatepass")), tuple(path.stat().st_size for path in paths)


def _same_files(paths: Sequence[Path], others: Sequence[Path], digest: Callable[[Path], str]) -> bool:
    """Return whether two lists of files, equal in number, have the same contents."""
    return all(a == b or digest(a) == digest(b) for a, b in zip(paths, others, strict=True))
