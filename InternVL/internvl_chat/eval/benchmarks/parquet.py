"""Read parquet files of the Hugging Face hub, which embed the images."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from internvl_chat.eval.benchmarks.item import Figure
from internvl_chat.eval.benchmarks.reading import Row
from internvl_chat.utils.errors import DataError, UsageError


def find_parquet(data: Path, split: str) -> list[Path]:
    """Return the files `SPLIT-*.parquet` of a split, in a folder or its subfolder `data/`, sorted by name."""
    return sorted(file for folder in (data, data / "data") for file in folder.glob(f"{split}-*.parquet"))


def parquet_rows(files: list[Path]) -> Iterator[Row]:
    """Yield the rows of parquet files; equal images share their bytes.

    Raises:
        DataError: a file is not a parquet file.
        UsageError: pyarrow is not installed.
    """
    try:
        from pyarrow import parquet
    except ImportError:
        raise UsageError("this benchmark requires pyarrow: pip install '.[eval]'") from None
    images: dict[bytes, bytes] = {}
    for file in files:
        try:
            rows = parquet.read_table(file).to_pylist()
        except (OSError, ValueError) as error:
            raise DataError(f"not a parquet file: {error}", file=file) from None
        for number, row in enumerate(rows, 1):
            for value in row.values():
                if content := image_bytes(value):
                    value["bytes"] = images.setdefault(content, content)
            yield Row(partial(dict, row), file, partial("row {}".format, number))


def image_bytes(value: Any) -> bytes | None:
    """Return the bytes of a parquet cell with an embedded image, or None for other cells."""
    content = value.get("bytes") if isinstance(value, Mapping) else None
    return content if isinstance(content, bytes) and content else None


def embedded_figure(row: Mapping[str, Any], key: str, label: str = "") -> Figure:
    """Return the image in a cell; its name is the stored path, or the key.

    Raises:
        DataError: the cell has no image.
    """
    content = image_bytes(row.get(key))
    if content is None:
        raise DataError(f"expected an embedded image for {key!r}")
    return Figure(row[key].get("path") or key, label, content=content)
