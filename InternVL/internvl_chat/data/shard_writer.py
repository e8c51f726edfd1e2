"""Write the images of datasets to tar shards, with a manifest per `root` and a new meta file."""

import io
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeAlias, cast

from internvl_chat.data.record_set import RecordSet
from internvl_chat.data.sources.images import ImageLocation, image_state
from internvl_chat.data.sources.meta import DatasetSpec
from internvl_chat.data.sources.problems import RecordError
from internvl_chat.data.sources.skip_policy import list_problems
from internvl_chat.data.storage.manifest import (
    MANIFEST,
    ImageRow,
    Shard,
    manifest_lines,
    normalized,
    tar_members,
)
from internvl_chat.data.storage.stores import ObjectStore, StoredImage
from internvl_chat.utils.errors import DataError, UsageError
from internvl_chat.utils.files import (
    append_json_line,
    atomic_path,
    open_for_appending,
    read_json_lines,
    sha256,
    write_json,
    write_json_lines,
)
from internvl_chat.utils.folder_lock import lock_folder
from internvl_chat.utils.hashed_file import HashedFile
from internvl_chat.utils.logging import get_logger
from internvl_chat.utils.text import counted

logger = get_logger(__name__)

# Names in the output folder. They are unusual, because relative paths in a meta file are first looked up in
# the data folder.
_IMAGES, _ANNOTATIONS = "image-shards", "shard-annotations"
# Log of finished shards, for a call after an interruption; deleted when the meta file is complete.
_PROGRESS = ".progress.jsonl"

Progress = Callable[[Sequence[int]], Iterable[int]]
# A shard and the images in it.
_Written: TypeAlias = tuple[Shard, list[ImageRow]]


class ShardingResult(NamedTuple):
    """Result of `write_shards`: the new meta file, the numbers of shards and images, and the total size."""

    meta: Path
    shards: int
    images: int
    bytes: int


class _Source(NamedTuple):
    """Image to write: its name in the shards, its location, and its state when it was found."""

    name: str
    location: ImageLocation
    num_bytes: int
    version: int


def write_shards(
    sets: Sequence[RecordSet],
    folder: Path,
    *,
    meta_name: str,
    shard_bytes: int,
    skip_unusable: bool,
    progress: Progress,
) -> ShardingResult:
    """Write the images of datasets to tar shards, and a copy of the annotation files.

    Datasets with the same root share their shards. An image is written once, in the order of the records.
    After an interruption, a call with the same arguments keeps the finished shards whose images have not
    changed. The meta file is written last.

    Args:
        sets: the datasets.
        folder: output folder.
        meta_name: name of the new meta file.
        shard_bytes: maximum total size of the images in a shard; an image that is larger gets its own shard.
        skip_unusable: exclude unusable images instead of failing.
        progress: wraps the shard numbers in a progress bar.

    Raises:
        DataError: a record or image is unusable, or an image changes during the call.
        UsageError: the folder already contains a meta file with this name, or its disk has too little space.
    """
    meta = folder / meta_name
    if meta.exists():
        raise UsageError(f"{meta} already exists; choose a different folder, or delete {folder}")
    sources = _find_sources(sets, skip_unusable)
    if not any(sources.values()):
        raise DataError("the records have no images to write")
    folder.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(folder)
    try:
        targets: dict[str, str] = {}
        totals = [0, 0, 0]
        for root, images in sources.items():
            name = f"{_IMAGES}-{len(set(targets.values())) + 1}" if targets else _IMAGES
            # A root without images refers to an existing folder of shards.
            targets[root] = name if images else next(iter(targets.values()), _IMAGES)
            if images:
                written = _write_folder(folder / name, images, shard_bytes, progress)
                totals = [total + more for total, more in zip(totals, written, strict=True)]
        entries = {}
        for number, records in enumerate(sets):
            annotation = Path(_ANNOTATIONS) / f"{number:02d}-{records.spec.annotation.name}"
            _copy(records.spec.annotation, folder / annotation)
            entries[records.spec.name] = _entry(records.spec, targets[_root_of(records)], annotation)
        write_json(meta, entries)
        for name in set(targets.values()):
            (folder / name / _PROGRESS).unlink(missing_ok=True)
    finally:
        lock.release()
    return ShardingResult(meta, *totals)


def _root_of(records: RecordSet) -> str:
    root = records.spec.root
    return str(root.absolute()) if isinstance(root, Path) else root


def _find_sources(sets: Sequence[RecordSet], skip_unusable: bool) -> dict[str, list[_Source]]:
    """Return the distinct images of each root in the order of the records.

    Raises:
        DataError: a record or image is unusable, and `skip_unusable` is False.
    """
    found: dict[str, dict[str, _Source]] = {}
    problems: list[str] = []
    for records in sets:
        known = found.setdefault(_root_of(records), {})
        if isinstance(records.root, ObjectStore):
            records.root.prepare(len(records))
        for index in range(len(records)):
            try:
                for source in _sources_of(records, index, known):
                    known[source.name] = source
            except DataError as error:
                problems.append(str(error))
    if problems:
        lines = list_problems(problems)
        message = "\n".join([f"{counted(len(problems), 'record')} cannot be used:", *lines])
        if not skip_unusable:
            raise DataError(
                f"{message}\nFix these records, or exclude their unusable images with --on_bad_record skip"
            )
        logger.warning("%s", message)
    return {root: list(images.values()) for root, images in found.items()}


def _sources_of(records: RecordSet, index: int, known: dict[str, _Source]) -> Iterator[_Source]:
    """Yield the images of a record that are not in `known`.

    Raises:
        DataError: the record or one of its images is unusable.
    """
    record = records.record(index)
    try:
        for name, location in zip(record.images, records.image_paths(record), strict=True):
            if name.startswith("/"):
                raise RecordError(f"the image {name} has an absolute path; use a path relative to 'root'")
            if normalized(name) not in known:
                yield _Source(normalized(name), location, *image_state(location))
    except RecordError as error:
        raise records.error(index, str(error), record.id, error.kind) from None


def _write_folder(
    folder: Path, sources: Sequence[_Source], shard_bytes: int, progress: Progress
) -> tuple[int, int, int]:
    """Write the shards of one root and their manifest; return the numbers of shards, images and bytes."""
    folder.mkdir(exist_ok=True)
    plan = list(_plan(sources, shard_bytes))
    finished = _finished_shards(folder, plan)
    if finished:
        logger.info("%s: %d of %s already written", folder, len(finished), counted(len(plan), "shard"))
    needed = sum(s.num_bytes for number, shard in enumerate(plan) if number not in finished for s in shard)
    if needed > (free := shutil.disk_usage(folder).free):
        raise UsageError(f"{folder}: needs {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free")
    with open_for_appending(folder / _PROGRESS) as stream:
        for number in progress(range(len(plan))):
            if number not in finished:
                finished[number] = shard, rows = _write_shard(folder, number, plan[number])
                versions = [source.version for source in plan[number]]
                append_json_line(stream, {"shard": shard, "images": rows, "versions": versions})
    shards = [finished[number][0] for number in range(len(plan))]
    images = [row for number in range(len(plan)) for row in finished[number][1]]
    _delete_leftovers(folder, {shard.file for shard in shards})
    write_json_lines(folder / MANIFEST, manifest_lines(shards, images))
    return len(shards), len(images), sum(shard.bytes for shard in shards)


def _delete_leftovers(folder: Path, shards: set[str]) -> None:
    """Delete incomplete shards, and shards of an interrupted run with another plan."""
    for file in [*folder.glob("shard-*.tar"), *folder.glob(".shard-*.tar.*.partial")]:
        if file.name not in shards:
            file.unlink()


def _plan(sources: Sequence[_Source], shard_bytes: int) -> Iterator[list[_Source]]:
    """Yield the images of each shard."""
    shard: list[_Source] = []
    total = 0
    for source in sources:
        if shard and total + source.num_bytes > shard_bytes:
            yield shard
            shard, total = [], 0
        shard.append(source)
        total += source.num_bytes
    yield shard


def _finished_shards(folder: Path, plan: Sequence[Sequence[_Source]]) -> dict[int, _Written]:
    """Return the shards from an interrupted call whose images have not changed, keyed by number."""
    finished = {}
    for row in read_json_lines(folder / _PROGRESS):
        if row is None:
            continue
        shard, images = Shard(*row["shard"]), [ImageRow(*image) for image in row["images"]]
        number = images[0].shard
        written = [
            (image.name, image.bytes, version) for image, version in zip(images, row["versions"], strict=True)
        ]
        planned = [(s.name, s.num_bytes, s.version) for s in plan[number]] if number < len(plan) else []
        file = folder / shard.file
        if written == planned and file.is_file() and file.stat().st_size == shard.bytes:
            finished[number] = shard, images
    return finished


def _write_shard(folder: Path, number: int, sources: Sequence[_Source]) -> _Written:
    """Write a shard, then read it back and compare each image with the original.

    Raises:
        DataError: an image has changed since it was listed, or the content read back differs.
    """
    file = folder / f"shard-{number:06d}.tar"
    expected = []
    with atomic_path(file) as partial:
        with HashedFile(partial) as target:
            # In stream mode, tarfile calls only `write`.
            stream = cast(IO[bytes], target)
            with tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as tar:
                for source in sources:
                    content = _read(source)
                    expected.append((source.name, len(content), sha256(content)))
                    member = tarfile.TarInfo(source.name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        entry = target.entry()
        images = _read_back(partial, number)
        if [(image.name, image.bytes, image.sha256) for image in images] != expected:
            raise DataError(
                "the content read back differs; check the disk, then run the command again", file=file
            )
    return Shard(file.name, entry.bytes, entry.sha256), images


def _read(source: _Source) -> bytes:
    location = source.location
    content = location.read() if isinstance(location, StoredImage) else location.read_bytes()
    if len(content) != source.num_bytes:
        raise DataError(
            "the image has changed since it was listed; run the command again", file=str(location)
        )
    return content


def _read_back(file: Path, number: int) -> list[ImageRow]:
    with file.open("rb", buffering=0) as stream:
        images = []
        for member in tar_members(file):
            stream.seek(member.offset_data)
            digest = sha256(stream.read(member.size))
            images.append(ImageRow(member.name, number, member.offset_data, member.size, digest))
    return images


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    with atomic_path(target) as partial:
        shutil.copyfile(source, partial)


def _entry(spec: DatasetSpec, root: str, annotation: Path) -> dict[str, Any]:
    """Return the meta file entry of a dataset, with paths relative to the meta file."""
    options = {
        "data_augment": spec.data_augment,
        "repeat_time": spec.repeat_time,
        "max_dynamic_patch": spec.max_dynamic_patch,
        "length": spec.length,
    }
    return {
        "root": root,
        "annotation": str(annotation),
        **{name: value for name, value in options.items() if value is not None},
    }
