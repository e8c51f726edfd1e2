"""The meta file (`PMC-data.json`): which data sets there are and how each is used."""

import difflib
import json
import math
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl_chat.data.encode.preprocessing import MOST_TILES
from internvl_chat.data.sources.problems import show_id, show_message
from internvl_chat.utils.errors import DataError, format_problems
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

_REQUIRED = ("root", "annotation", "data_augment", "repeat_time")
_OPTIONAL = ("max_dynamic_patch", "length")
_LARGEST_FILE = 1 << 26
_MOST_REPEATS = 1000
_LONGEST_NAME = 200


@dataclass(frozen=True)
class DatasetSpec:
    """One entry of the meta file.

    Attributes:
        name: its key in the file.
        root: folder that image paths count from.
        annotation: the file of records.
        data_augment: degrade the images at random while training.
        repeat_time: below 1, the fraction of records used, from the first; else how often each is used.
        max_dynamic_patch: tiles a record may use; None leaves it to the command line.
        length: number of records that the file is said to have.
    """

    name: str
    root: Path
    annotation: Path
    data_augment: bool = False
    repeat_time: float = 1
    max_dynamic_patch: int | None = None
    length: int | None = None


def load_meta(path: str | Path, data_root: str | Path) -> list[DatasetSpec]:
    """Read a meta file; paths in it may hold `~` and `$NAME`, and else count from `data_root`.

    Raises:
        DataError: the file is missing or malformed; every problem of every entry at once.
    """
    path = Path(path).expanduser()
    entries = _read_object(path)
    problems: list[str] = []
    specs = [_parse_entry(name, entry, Path(data_root), problems) for name, entry in entries.items()]
    if not entries:
        problems.append("it names no data set")
    if problems:
        raise DataError(format_problems(problems), file=path)
    return [spec for spec in specs if spec is not None]


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object whose keys are unique."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [name for name, times in Counter(name for name, _ in pairs).items() if times > 1]
        if twice:
            raise DataError(f"the key {sorted(twice)[0]!r} appears twice", file=path)
        return dict(pairs)

    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise DataError("too large for a meta file; is it a file of records?", file=path)
        meta = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except FileNotFoundError:
        raise DataError("no such meta file; give one with --meta_path", file=path) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read: {error}", file=path) from None
    except RecursionError:
        raise DataError("JSON is nested too deeply", file=path) from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"not valid JSON: {error.msg} (column {error.colno})", file=path, line=error.lineno
        ) from None
    except ValueError:
        raise DataError("not valid JSON: a number has too many digits", file=path) from None
    if not isinstance(meta, dict):
        raise DataError("must be a JSON object: data set name -> settings", file=path)
    return meta


def _parse_entry(name: str, entry: Any, data_root: Path, problems: list[str]) -> DatasetSpec | None:
    """Check one entry, adding to `problems`; returns None if it cannot be used."""
    if len(name) > _LONGEST_NAME or not name.isprintable():
        problems.append(f"{_shown(name)}: give the data set a name of at most {_LONGEST_NAME} letters")
        return None
    if not isinstance(entry, dict):
        problems.append(f"{name}: must be an object with {', '.join(_REQUIRED)}")
        return None
    before = len(problems)
    for key in _REQUIRED:
        if key not in entry:
            problems.append(f"{name}: {key!r} is missing")
    for key in entry.keys() - {*_REQUIRED, *_OPTIONAL}:
        near = difflib.get_close_matches(key[:_LONGEST_NAME], (*_REQUIRED, *_OPTIONAL), n=1)
        logger.warning(
            "data set %s: unknown key %r%s",
            name,
            show_id(key),
            f", did you mean {near[0]!r}?" if near else "",
        )
    paths = {}
    for key in ("root", "annotation"):
        if key not in entry:
            continue
        if not isinstance(entry[key], str):
            problems.append(f"{name}: {key!r} must be a path, found {_shown(entry[key])}")
            continue
        paths[key] = _resolve(name, key, entry[key], data_root, problems)
    if paths.get("annotation") and not _is_file(paths["annotation"]):
        problems.append(f"{name}: the annotation file {paths['annotation']} does not exist")
    if "data_augment" in entry and not isinstance(entry["data_augment"], bool):
        found = _shown(entry["data_augment"])
        problems.append(f"{name}: 'data_augment' must be true or false, found {found}")
    repeat = entry.get("repeat_time", 1)
    if not _is_number(repeat) or not 0 < repeat < math.inf or (repeat > 1 and repeat != int(repeat)):
        problems.append(
            f"{name}: 'repeat_time' must be a fraction between 0 and 1 or a whole number, "
            f"found {_shown(repeat)}"
        )
    elif repeat > _MOST_REPEATS:
        problems.append(f"{name}: 'repeat_time' must be at most {_MOST_REPEATS}, found {_shown(repeat)}")
    tiles = entry.get("max_dynamic_patch")
    if tiles is not None and (not isinstance(tiles, int) or isinstance(tiles, bool) or tiles < 1):
        problems.append(f"{name}: 'max_dynamic_patch' must be a whole number from 1, found {_shown(tiles)}")
    elif tiles is not None and tiles > MOST_TILES:
        problems.append(f"{name}: 'max_dynamic_patch' must be at most {MOST_TILES}, found {_shown(tiles)}")
    length = _parse_length(name, entry.get("length"), problems)
    if len(problems) > before:
        return None
    return DatasetSpec(
        name=name,
        root=paths["root"],
        annotation=paths["annotation"],
        data_augment=entry["data_augment"],
        repeat_time=repeat,
        max_dynamic_patch=tiles,
        length=length,
    )


def _shown(value: Any) -> str:
    """Return a value of whatever kind and size as a message may quote it."""
    try:
        return show_message(repr(value))
    except RecursionError:
        return "something nested too deeply"


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # as for a name that is too long
        return False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _parse_length(name: str, length: Any, problems: list[str]) -> int | None:
    """Read a number of records, which the published files write as a string."""
    if length is None or (isinstance(length, int) and not isinstance(length, bool) and length >= 0):
        return length
    if isinstance(length, str) and re.fullmatch(r"\d{1,18}", length.strip()):
        return int(length)
    problems.append(f"{name}: 'length' must be a number of records, found {_shown(length)}")
    return None


def _resolve(name: str, key: str, value: str, data_root: Path, problems: list[str]) -> Path | None:
    """Expand `~` and `$NAME` and make the path absolute."""
    unset = [variable for variable in re.findall(r"\$\{?(\w+)\}?", value) if not os.environ.get(variable)]
    if unset:
        problems.append(
            f"{name}: {key!r} uses ${unset[0]}, which is not set; export {unset[0]}=FOLDER or edit the path"
        )
        return None
    try:
        return data_root / Path(os.path.expandvars(value)).expanduser()
    except RuntimeError as error:
        problems.append(f"{name}: {key!r} is {value!r}: {error}")
        return None
