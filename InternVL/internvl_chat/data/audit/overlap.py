"""Find held-out records whose conversation and images also occur in the training data."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cache

from internvl_chat.data.dataset import TrainingData
from internvl_chat.data.record_set import RecordKey
from internvl_chat.data.sources.images import ImageLocation, image_sha256, image_state
from internvl_chat.data.sources.problems import RecordError
from internvl_chat.data.sources.records import Record
from internvl_chat.utils.errors import DataError
from internvl_chat.utils.files import sha256
from internvl_chat.utils.logging import get_logger
from internvl_chat.utils.text import counted

logger = get_logger(__name__)


def warn_about_overlap(training: TrainingData, eval_data: TrainingData) -> None:
    """Log how many records of each held-out dataset also occur in the training data, with an example."""
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
            "validation: %d of the %s in %s also occur in the training data, with the same conversation and "
            "images (for example, %s and %s); remove them from one of the two datasets",
            len(found), counted(len(eval_data.indices(number)), "record"), name, first, other,
        )  # fmt: skip


def repeated_records(
    training: TrainingData, eval_data: TrainingData
) -> Iterator[tuple[RecordKey, RecordKey]]:
    """Yield (held-out key, training key) for each held-out record that is also used for training.

    If multiple training records match, the first one is returned. Images are compared by content, so copies
    with a different name are found. To limit reading, images are compared only if their records have the same
    conversation and the files have the same size.
    """
    candidates: dict[str, list[tuple[RecordKey, list[ImageLocation]]]] = defaultdict(list)
    for key, conversation, paths in _conversations(eval_data):
        candidates[conversation].append((key, paths))
    first: dict[RecordKey, RecordKey] = {}
    digest = cache(image_sha256)
    for key, conversation, paths in _conversations(training):
        for eval_key, eval_paths in candidates.get(conversation, ()):
            if eval_key not in first and _same_files(paths, eval_paths, digest):
                first[eval_key] = key
    yield from sorted(first.items())


def _conversations(data: TrainingData) -> Iterator[tuple[RecordKey, str, list[ImageLocation]]]:
    """Yield the key, message hash and image paths of each used record."""
    for number, records in enumerate(data.sets):
        for index in data.indices(number).tolist():
            try:
                record = records.record(index)
                paths = records.image_paths(record)
            except (DataError, RecordError):
                continue  # reported when the record is used
            yield RecordKey(records.spec.name, index), _hash_messages(record), paths


def _hash_messages(record: Record) -> str:
    text = "\0".join(f"{message.role}:{message.content.strip()}" for message in record.messages)
    return sha256(text.encode("utf-8", "surrogatepass"))


def _same_files(
    paths: Sequence[ImageLocation], others: Sequence[ImageLocation], digest: Callable[[ImageLocation], str]
) -> bool:
    """Return whether two lists of files have the same contents; False if a file cannot be read."""
    if len(paths) != len(others):
        return False
    pairs = [(a, b) for a, b in zip(paths, others, strict=True) if a != b]
    try:
        if any(image_state(a).num_bytes != image_state(b).num_bytes for a, b in pairs):
            return False
        return all(digest(a) == digest(b) for a, b in pairs)
    except (RecordError, OSError):  # reported when the record is used
        return False
