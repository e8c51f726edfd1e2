"""What a benchmark consists of, gathered from its files: articles, images, and what could not be read.

A guard that passes over a file would say that all is well: whatever is not compared is named.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from internvl_chat.data.sources.images import open_image
from internvl_chat.data.sources.jsonl import RecordFile
from internvl_chat.data.sources.meta import load_meta
from internvl_chat.data.sources.problems import Problem, RecordProblem, show_message
from internvl_chat.utils.errors import DataError

# What problems of a benchmark have in place of a data set's name.
BENCHMARK = "benchmark"

_ARTICLE = re.compile(rb"(?<![A-Za-z0-9])PMC\d+")
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".tif", ".tiff", ".webp", ".bmp", ".jp2")
_LONGEST_PATH = 4096
# How JPEG, PNG, GIF and WebP begin in base64.
_IMAGE_AS_TEXT = re.compile(rb"(?<![A-Za-z0-9+/])(?:/9j\\?/|iVBORw0KGgo|R0lGOD|UklGR)[A-Za-z0-9+/\\]{40}")
# What separates the cells of a table's line.
_CELLS = {".csv": re.compile(rb"[,;\t]"), ".tsv": re.compile(rb"\t")}
_QUOTES = b"\"'[] \r\n"
# Control characters that no text has.
_NO_TEXT = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
_HEAD = 1 << 13


@dataclass
class Benchmark:
    """What must not be trained on.

    Attributes:
        articles: PMC id -> where it is named.
        images: files.
        problems: warnings that name what is not compared.
    """

    articles: dict[str, str] = field(default_factory=dict)
    images: list[Path] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def read_benchmark(paths: Sequence[Path], data_root: Path) -> Benchmark:
    """Gather articles and images from meta files, files of any text, images, and folders of all these.

    Images named in JSON or in a cell of a table (.csv, .tsv) are looked for in the file's folder, in `images`
    there, and in `images` beside it. What Git keeps in `.git` is passed over.

    Args:
        paths: of folders everything below is taken.
        data_root: what relative paths in meta files count from.

    Raises:
        DataError: a path does not exist, a file of text cannot be read, or there is nothing to compare with.
    """
    gatherer = _Gatherer(data_root)
    for path in paths:
        if not path.exists():
            raise DataError("no such file or folder to compare with", file=path)
        for file in gatherer.files(path) if path.is_dir() else [path]:
            gatherer.add(file)
    found = gatherer.found
    if not found.articles and not found.images:
        why = "".join(f"; {problem}" for problem in found.problems[:1])
        raise DataError(f"no PMC ids and no images in {', '.join(map(str, paths))}{why}")
    return found


def articles_in(content: bytes) -> set[str]:
    """Return the PMC ids that a text names.

    >>> sorted(articles_in(b"PMC12_f1.jpg, as in PMC345. XPMC6"))
    ['PMC12', 'PMC345']
    """
    return {article.decode() for article in _ARTICLE.findall(content)}


def not_compared(file: Path, message: str, line: int | None = None) -> Problem:
    """Return a warning that a part of a benchmark is not compared."""
    return Problem(BENCHMARK, None, file, line, None, "not compared", show_message(message))


class _Gatherer:
    """Takes in one file after the other.

    Args:
        data_root: what relative paths in meta files count from.
    """

    def __init__(self, data_root: Path) -> None:
        self.found = Benchmark()
        self._data_root = data_root
        self._images: set[Path] = set()
        self._not_found: set[str] = set()
        self._inside: Counter[Path] = Counter()

    def files(self, folder: Path) -> Iterator[Path]:
        """Yield all files below a folder."""
        for place, folders, names in os.walk(folder, onerror=_cannot_list):
            folders[:] = sorted(name for name in folders if name != ".git")
            for linked in (Path(place, name) for name in folders):
                if linked.is_symlink():
                    self._warn(linked, "a link to a folder, which is not followed; give the folder itself")
            for file in (Path(place, name) for name in sorted(names)):
                if file.is_file():
                    yield file
                else:
                    self._warn(file, "no file that can be read, so not compared")

    def add(self, file: Path) -> None:
        """Take in a file."""
        suffix = file.suffix.lower()
        if suffix in _IMAGE_SUFFIXES:
            self._add_image(file)
        elif suffix in (".json", ".jsonl"):
            self._read_json(file)
        elif _is_text(file):
            self._read_text(file)
        elif _is_image(file):
            self._add_image(file)
        else:
            self._warn(file, "neither an image nor text, so not compared")
        for text, number in (+self._inside).items():
            self._warn(
                text, f"{number:,} images inside it as text (base64) are not compared; save them as files"
            )
        self._inside.clear()

    def _warn(self, file: Path, message: str, line: int | None = None) -> None:
        self.found.problems.append(not_compared(file, message, line))

    def _add_image(self, file: Path) -> None:
        if file in self._images:
            return
        self._images.add(file)
        self.found.images.append(file)
        self._add_articles(os.fsencode(file.name), str(file))

    def _add_articles(self, content: bytes, place: str) -> None:
        for article in articles_in(content):
            self.found.articles.setdefault(article, place)

    def _read_json(self, file: Path) -> None:
        """Take in a meta file, a file of records, or any other JSON."""
        if file.suffix.lower() == ".json" and (single := _read_object(file)) is not None:
            if single and all(isinstance(v, dict) and "annotation" in v for v in single.values()):
                for spec in load_meta(file, self._data_root):
                    self._read_records(spec.annotation, [spec.root])
            else:
                self._read_item(file, None, json.dumps(single).encode(), single, _near(file))
            return
        self._read_records(file, _near(file))

    def _read_records(self, file: Path, folders: Sequence[Path]) -> None:
        records = RecordFile(file)
        for i in range(len(records)):
            self._read_item(file, records.line(i), records.read(i), records[i], folders)

    def _read_text(self, file: Path) -> None:
        """Take in the lines of a text, and the cells of those of a table."""
        cells, near = _CELLS.get(file.suffix.lower()), _near(file)
        try:
            with file.open("rb") as stream:
                for number, line in enumerate(stream, 1):
                    parts = cells.split(line) if cells else []
                    item = [part.strip(_QUOTES).decode("utf-8", "replace") for part in parts]
                    self._read_item(file, number, line, item, near)
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", file=file) from None

    def _read_item(
        self, file: Path, line: int | None, content: bytes, item: Any, folders: Sequence[Path]
    ) -> None:
        """Take in what a record or a line names."""
        self._add_articles(content, str(file) if line is None else f"{file}, line {line}")
        self._inside[file] += len(_IMAGE_AS_TEXT.findall(content))
        for name in _image_names(item):
            image = next((path for folder in folders if _is_file(path := folder / name)), None)
            if image is not None:
                self._add_image(image)
            elif name not in self._not_found:
                self._not_found.add(name)
                self._warn(file, f"the image {name} is named there, but was not found, so not compared", line)


def _cannot_list(error: OSError) -> NoReturn:
    raise DataError(f"cannot be read: {error.strerror}", file=error.filename) from None


def _near(file: Path) -> list[Path]:
    return [file.parent, file.parent / "images", file.parent.parent / "images"]


def _is_text(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return _NO_TEXT.search(stream.read(_HEAD)) is None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", file=file) from None


def _is_image(file: Path) -> bool:
    try:
        with open_image(file):
            return True
    except RecordProblem:
        return False


def _read_object(file: Path) -> dict[str, Any] | None:
    """Return what a JSON file holds if that is one object, not an array of records."""
    try:
        with file.open("rb") as stream:
            if not stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
                return None
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot be read: {error}", file=file, kind="json") from None


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


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
