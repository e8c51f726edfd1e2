"""The meta file (such as `PMC-data.json`): the training datasets and their settings."""

import difflib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl_chat.constants import MAX_TILES
from internvl_chat.data.sources.jsonl import describe_json_error, unique_keys
from internvl_chat.data.sources.problems import printable_id, printable_message
from internvl_chat.data.storage.stores import fetch_file, parse_root
from internvl_chat.data.storage.urls import check_url, is_url
from internvl_chat.utils.errors import DataError, format_problems
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

_REQUIRED = ("root", "annotation")
_OPTIONAL = ("data_augment", "repeat_time", "max_dynamic_patch", "length")
_MAX_FILE_BYTES = 1 << 26
_HEAD = 1 << 16
_MAX_REPEATS = 1000
_MAX_NAME_LENGTH = 200


@dataclass(frozen=True)
class DatasetSpec:
    """One entry of the meta file.

    Attributes:
        name: key of the entry.
        root: base folder of relative image paths, a folder of tar shards, or a URL of either.
        data_augment: apply random JPEG degradation to the images during training.
        repeat_time: below 1, the fraction of records used, from the start of the file; otherwise the number
            of times each record is used per epoch.
        max_dynamic_patch: maximum number of tiles per record, without thumbnails; None for the run's limit.
        length: expected number of records.
    """

    name: str
    root: Path | str
    annotation: Path
    data_augment: bool = False
    repeat_time: float = 1
    max_dynamic_patch: int | None = None
    length: int | None = None

    def num_used(self, total: int) -> int:
        """Return the number of records per epoch, with repetitions, for a file with `total` records."""
        return int(total * self.repeat_time) if self.repeat_time < 1 else total * int(self.repeat_time)


def load_meta(
    path: str | Path, data_root: str | Path, image_root: str | Path | None = None
) -> list[DatasetSpec]:
    """Return the datasets of a meta file; `~` and `$NAME` in paths are expanded.

    Args:
        path: the meta file; with `image_root`, an annotation file, whose name becomes the dataset's name.
        data_root: base folder of relative paths; a path that does not exist there is looked up in the folder
            of the meta file.
        image_root: images of an annotation file; see `DatasetSpec.root`.

    Raises:
        DataError: the file is missing or malformed; the message lists the problems of all entries.
    """
    path = Path(path).expanduser()
    entries = _read_object(path)
    if entries is None or _is_record(entries):
        if image_root is not None:
            return [DatasetSpec(path.name.split(".")[0], parse_root(image_root), path)]
        raise DataError(
            "this is an annotation file, not a meta file; add --image_root FOLDER with its images (or any "
            "folder if the records are text-only), or pass a meta file",
            file=path,
        )
    if image_root is not None:
        raise DataError("a meta file sets 'root' for each dataset; remove --image_root", file=path)
    folders = Path(data_root), path.parent
    problems: list[str] = []
    specs = [_parse_entry(name, entry, folders, problems) for name, entry in entries.items()]
    if not entries:
        problems.append("it contains no datasets")
    if problems:
        raise DataError(format_problems(problems), file=path)
    return [spec for spec in specs if spec is not None]


def _is_record(meta: dict[str, Any]) -> bool:
    """Return whether a JSON object is a record rather than a meta file."""
    return isinstance(meta.get("conversations", meta.get("messages")), list)


def _holds_records(path: Path) -> bool:
    """Return whether a file is an annotation file, based on its content and name."""
    with path.open("rb") as stream:
        start = stream.read(_HEAD)
    first, _, rest = start.decode("utf-8", "replace").removeprefix("\ufeff").lstrip().partition("\n")
    if start.startswith((b"\x1f\x8b", b"PAR1")) or re.match(r"\[\s*(\{|$)", f"{first}{rest}"):
        return True
    try:
        return isinstance(json.loads(first), dict) and rest.lstrip().startswith("{")
    except (ValueError, RecursionError):
        return ".jsonl" in path.name.lower()


def _read_object(path: Path) -> dict[str, Any] | None:
    """Return the content of a meta file; None for an annotation file."""
    try:
        if path.is_dir():
            files = ", ".join(sorted(file.name for file in path.glob("*.json"))[:5])
            hint = f"; pass one of its files, such as {files}" if files else ""
            raise DataError(f"cannot be read: it is a folder{hint}", file=path)
        if _holds_records(path):
            return None
        if (size := path.stat().st_size) > _MAX_FILE_BYTES:
            message = f"has {size:,} bytes, more than the limit of {_MAX_FILE_BYTES:,} for a meta file"
            raise DataError(f"{message}; is it an annotation file?", file=path)
        meta = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique_keys)
    except FileNotFoundError:
        raise DataError("no such meta file; set --meta_path", file=path) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read: {error}", file=path) from None
    except (ValueError, RecursionError) as error:
        column = f" (column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        line = getattr(error, "lineno", None)
        raise DataError(describe_json_error(error) + column, file=path, line=line) from None
    if not isinstance(meta, dict):
        raise DataError("must be a JSON object that maps dataset names to their settings", file=path)
    return meta


def _parse_entry(name: str, entry: Any, folders: Sequence[Path], problems: list[str]) -> DatasetSpec | None:
    """Parse one entry; if it is invalid, append to `problems` and return None."""
    if len(name) > _MAX_NAME_LENGTH or not name.isprintable():
        problems.append(
            f"{_quote(name)}: the dataset name is too long or not printable; use at most {_MAX_NAME_LENGTH} "
            "printable characters"
        )
        return None
    if not isinstance(entry, dict):
        problems.append(f"{name}: must be an object with {' and '.join(_REQUIRED)}")
        return None
    before = len(problems)
    problems += [f"{name}: {key!r} is missing" for key in _REQUIRED if key not in entry]
    for key in entry.keys() - {*_REQUIRED, *_OPTIONAL}:
        similar = difflib.get_close_matches(key[:_MAX_NAME_LENGTH], (*_REQUIRED, *_OPTIONAL), n=1)
        hint = f", did you mean {similar[0]!r}?" if similar else ""
        logger.warning("dataset %s: unknown key %r%s", name, printable_id(key), hint)

    def expect(valid: bool, key: str, expected: str) -> None:
        if not valid:
            problems.append(f"{name}: {key!r} must be {expected}, found {_quote(entry[key])}")

    paths: dict[str, Path | str | None] = {}
    for key in (key for key in ("root", "annotation") if key in entry):
        expect(isinstance(entry[key], str), key, "a path")
        if isinstance(entry[key], str):
            paths[key] = _resolve(name, key, entry[key], folders, problems)
    root, annotation = paths.get("root"), paths.get("annotation")
    assert not isinstance(annotation, str)
    if annotation and not _exists(annotation):
        others = {str(folder / entry["annotation"]) for folder in folders} - {str(annotation)}
        more = f", and neither does {others.pop()}" if len(others) == 1 else ""
        problems.append(f"{name}: the annotation file {annotation} does not exist{more}")
    augment = entry.get("data_augment", False)
    expect(isinstance(augment, bool), "data_augment", "true or false")
    repeat = entry.get("repeat_time", 1)  # type() excludes booleans
    repeatable = type(repeat) in (int, float) and (0 < repeat < 1 or repeat in range(1, _MAX_REPEATS + 1))
    expect(repeatable, "repeat_time", f"a fraction between 0 and 1 or a whole number up to {_MAX_REPEATS}")
    tiles = entry.get("max_dynamic_patch")
    valid = tiles is None or (type(tiles) is int and 1 <= tiles <= MAX_TILES)
    expect(valid, "max_dynamic_patch", f"a whole number from 1 to {MAX_TILES}")
    length = entry.get("length")
    if isinstance(length, str) and re.fullmatch(r"\d{1,18}", length.strip()):
        length = int(length)  # as in the published files
    expect(length is None or (type(length) is int and length >= 0), "length", "a number of records")
    if len(problems) > before or root is None or annotation is None:
        return None
    return DatasetSpec(name, root, annotation, augment, repeat, tiles, length)


def _quote(value: Any) -> str:
    """Return a printable representation of limited length."""
    try:
        return printable_message(repr(value))
    except RecursionError:
        return "a deeply nested value"


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # for example, the name is too long
        return False


def _resolve(
    name: str, key: str, value: str, folders: Sequence[Path], problems: list[str]
) -> Path | str | None:
    """Expand `~` and `$NAME`, then resolve the path against the first folder in which it exists.

    The annotation file of a URL is downloaded. If this fails, or the value cannot be expanded, append to
    `problems` and return None.
    """
    unset = [variable for variable in re.findall(r"\$\{?(\w+)\}?", value) if not os.environ.get(variable)]
    if unset:
        problems.append(
            f"{name}: {key!r} uses ${unset[0]}, which is not set; export {unset[0]}=FOLDER or edit the path"
        )
        return None
    value = os.path.expandvars(value)
    if is_url(value):
        try:
            return check_url(value) if key == "root" else fetch_file(check_url(value))
        except DataError as error:
            problems.append(f"{name}: {key!r}: {error}")
        except FileNotFoundError:
            problems.append(f"{name}: the annotation file {value} does not exist")
        return None
    try:
        path = Path(value).expanduser()
    except RuntimeError as error:
        problems.append(f"{name}: {key!r} is {value!r}: {error}")
        return None
    found = list(dict.fromkeys(folder / path for folder in folders if _exists(folder / path)))
    if len(found) > 1 and not found[0].samefile(found[1]):
        logger.warning("dataset %s: %r resolves to %s; %s also exists", name, key, *found)
    return found[0] if found else folders[0] / path
