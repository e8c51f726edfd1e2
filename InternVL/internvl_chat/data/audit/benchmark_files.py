"""Read the articles and images of a benchmark for comparison with training data.

Everything that cannot be compared is reported, because skipping it silently would hide contamination.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from internvl_chat.data.sources.images import ImageLocation, open_image
from internvl_chat.data.sources.jsonl import RecordFile
from internvl_chat.data.sources.meta import load_meta
from internvl_chat.data.sources.problems import Problem, RecordError, printable_message
from internvl_chat.data.storage.stores import ImageStore, open_root
from internvl_chat.utils.errors import DataError
from internvl_chat.utils.files import is_file

# Dataset name in the problems of a benchmark.
BENCHMARK = "benchmark"

_ARTICLE = re.compile(rb"(?<![A-Za-z0-9])PMC\d+")
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".tif", ".tiff", ".webp", ".bmp", ".jp2")
_MAX_PATH = 4096
# Base64-encoded start of a JPEG, PNG, GIF or WebP file.
_BASE64_IMAGE = re.compile(rb"(?<![A-Za-z0-9+/])(?:/9j\\?/|iVBORw0KGgo|R0lGOD|UklGR)[A-Za-z0-9+/\\]{40}")
_SEPARATORS = {".csv": re.compile(rb"[,;\t]"), ".tsv": re.compile(rb"\t")}
_QUOTES = b"\"'[] \r\n"
# Control characters that do not occur in text.
_BINARY = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
_HEAD = 1 << 13


@dataclass
class Benchmark:
    """Benchmark content that must not occur in training data.

    Attributes:
        articles: PMC id -> location of its first mention.
        images: image files.
        problems: warnings about content that cannot be compared.
    """

    articles: dict[str, str] = field(default_factory=dict)
    images: list[ImageLocation] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def read_benchmark(paths: Sequence[Path], data_root: Path) -> Benchmark:
    """Read the PMC ids and images of a benchmark from meta files, JSON and other text files, and image files.

    Image names in JSON and in table cells (.csv, .tsv) are looked up next to the file, in its subfolder
    `images`, and in `../images`. The images of a meta file's records are looked up in the `root` folder of
    their dataset (see `DatasetSpec`). `.git` folders are skipped.

    Args:
        paths: files and folders; folders are searched recursively.
        data_root: base folder of relative paths in meta files.

    Raises:
        DataError: a path does not exist, a file cannot be read, or there are no articles or images.
    """
    reader = _BenchmarkReader(data_root)
    for path in paths:
        if not path.exists():
            raise DataError("no such file or folder", file=path)
        for file in reader.list_files(path) if path.is_dir() else [path]:
            reader.add(file)
    benchmark = reader.benchmark
    if not benchmark.articles and not benchmark.images:
        reason = "".join(f"; {problem}" for problem in benchmark.problems[:1])
        raise DataError(f"no PMC ids or images in {', '.join(map(str, paths))}{reason}")
    return benchmark


def find_articles(content: bytes) -> set[str]:
    """Return the PMC ids in text.

    >>> sorted(find_articles(b"PMC12_f1.jpg, as in PMC345. XPMC6"))
    ['PMC12', 'PMC345']
    """
    return {article.decode() for article in _ARTICLE.findall(content)}


def not_compared(file: Path, message: str, line: int | None = None) -> Problem:
    """Return a warning about a part of the benchmark that cannot be compared."""
    return Problem(BENCHMARK, None, file, line, None, "not compared", printable_message(message))


class _BenchmarkReader:
    """Reads files and collects their articles, images and problems in the attribute `benchmark`."""

    def __init__(self, data_root: Path) -> None:
        self.benchmark = Benchmark()
        self._data_root = data_root
        self._images: set[ImageLocation] = set()
        self._not_found: set[str] = set()
        self._embedded: Counter[Path] = Counter()

    def list_files(self, folder: Path) -> Iterator[Path]:
        """Yield all files in a folder and its subfolders."""
        for parent, folders, names in os.walk(folder, onerror=_raise_unreadable):
            folders[:] = sorted(name for name in folders if name != ".git")
            for subfolder in (Path(parent, name) for name in folders):
                if subfolder.is_symlink():
                    self._warn(subfolder, "links to folders are not followed; pass the folder itself")
            for file in (Path(parent, name) for name in sorted(names)):
                if file.is_file():
                    yield file
                else:
                    self._warn(file, "not a readable file, so not compared")

    def add(self, file: Path) -> None:
        """Add the articles and images of a file; warn about a file that is neither an image nor text."""
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
        for source, count in (+self._embedded).items():
            self._warn(source, f"{count:,} embedded base64 images are not compared; save them as files")
        self._embedded.clear()

    def _warn(self, file: Path, message: str, line: int | None = None) -> None:
        self.benchmark.problems.append(not_compared(file, message, line))

    def _add_image(self, file: ImageLocation) -> None:
        if file in self._images:
            return
        self._images.add(file)
        self.benchmark.images.append(file)
        self._add_articles(os.fsencode(file.name), str(file))

    def _add_articles(self, content: bytes, location: str) -> None:
        for article in find_articles(content):
            self.benchmark.articles.setdefault(article, location)

    def _read_json(self, file: Path) -> None:
        """Add a JSON or JSONL file: records, any other object, or the annotation files of a meta file."""
        if file.suffix.lower() == ".json" and (content := _read_object(file)) is not None:
            if content and all(isinstance(v, dict) and "annotation" in v for v in content.values()):
                for spec in load_meta(file, self._data_root):
                    self._read_records(spec.annotation, [open_root(spec.root)])
            else:
                self._read_item(file, None, json.dumps(content).encode(), content, _image_folders(file))
        else:
            self._read_records(file, _image_folders(file))

    def _read_records(self, file: Path, folders: Sequence[Path | ImageStore]) -> None:
        records = RecordFile(file)
        for i in range(len(records)):
            self._read_item(file, records.line(i), records.read(i), records[i], folders)

    def _read_text(self, file: Path) -> None:
        """Add the lines of a text file and the cells of a table."""
        separators, folders = _SEPARATORS.get(file.suffix.lower()), _image_folders(file)
        try:
            with file.open("rb") as stream:
                for number, line in enumerate(stream, 1):
                    cells = separators.split(line) if separators else []
                    item = [cell.strip(_QUOTES).decode("utf-8", "replace") for cell in cells]
                    self._read_item(file, number, line, item, folders)
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", file=file) from None

    def _read_item(
        self, file: Path, line: int | None, content: bytes, item: Any, folders: Sequence[Path | ImageStore]
    ) -> None:
        """Add the articles and images named in a record or line.

        Embedded images are counted, and images that do not exist become warnings.
        """
        self._add_articles(content, str(file) if line is None else f"{file}, line {line}")
        self._embedded[file] += len(_BASE64_IMAGE.findall(content))
        for name in _image_names(item):
            image = next((found for folder in folders if (found := _find_image(folder, name))), None)
            if image is not None:
                self._add_image(image)
            elif name not in self._not_found:
                self._not_found.add(name)
                self._warn(file, f"the image {name} was not found, so not compared", line)


def _raise_unreadable(error: OSError) -> NoReturn:
    raise DataError(f"cannot be read: {error.strerror}", file=error.filename) from None


def _find_image(folder: Path | ImageStore, name: str) -> ImageLocation | None:
    if isinstance(folder, Path):
        return path if is_file(path := folder / name) else None
    image = folder.image(name)
    try:
        image.state()
    except RecordError:
        return None
    return image


def _image_folders(file: Path) -> list[Path]:
    return [file.parent, file.parent / "images", file.parent.parent / "images"]


def _is_text(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return _BINARY.search(stream.read(_HEAD)) is None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", file=file) from None


def _is_image(file: Path) -> bool:
    try:
        with open_image(file):
            return True
    except RecordError:
        return False


def _read_object(file: Path) -> dict[str, Any] | None:
    """Return the content of a JSON file if it is an object; None otherwise, as for an array of records."""
    try:
        with file.open("rb") as stream:
            if not stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
                return None
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot be read: {error}", file=file, kind="json") from None


def _image_names(item: Any) -> Iterator[str]:
    """Yield all image file names in a JSON value."""
    pending = [item]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list):
            pending += value
        elif isinstance(value, str) and _is_image_name(value):
            yield value


def _is_image_name(text: str) -> bool:
    return len(text) < _MAX_PATH and "\n" not in text and text.lower().endswith(_IMAGE_SUFFIXES)
