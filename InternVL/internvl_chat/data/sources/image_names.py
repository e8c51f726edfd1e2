"""Error messages for image names that do not refer to a file: URLs, embedded images, mismatched names."""

import os
import re
import unicodedata
from functools import lru_cache
from pathlib import Path

from internvl_chat.data.sources.problems import printable_message
from internvl_chat.data.storage.urls import redact
from internvl_chat.utils.files import is_file

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://", re.ASCII)
# Base64-encoded start of a JPEG, PNG, GIF, WebP or TIFF file.
_BASE64 = re.compile(r"(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR|SUkqA|TU0AK)[A-Za-z0-9+/=\s]*", re.ASCII)
_MIN_BASE64 = 64
# Number of cached folder listings.
_MAX_FOLDERS = 8


def describe_remote(name: str) -> str | None:
    """Return an error message if a name is a URL or base64 data; None for a path."""
    if name.startswith("data:") or (len(name) >= _MIN_BASE64 and _BASE64.fullmatch(name)):
        return (
            f"the image is embedded as base64 ({name[:24]}...), which is not supported; save it as a file "
            "and give its path"
        )
    scheme = _SCHEME.match(name)
    if scheme is None:
        return None
    if scheme[1].lower() == "file":
        return f"the image {printable_message(name)} is a file:// URL; give the path without file://"
    return (
        f"the image {printable_message(redact(name))} is a URL ({scheme[1]}://), which is not supported; "
        "download it and give the path to the file"
    )


def describe_missing(path: Path) -> str | None:
    """Return a likely reason why a path does not exist, based on the files next to it; None if unknown."""
    if similar := _similar_file(path):
        return similar
    if "\\" in str(path) and (other := Path(str(path).replace("\\", "/"))).is_file():
        return f"{other} exists: use / instead of \\ in the path"
    return None


def _similar_file(path: Path) -> str | None:
    """Describe a file whose name differs only in Unicode form, case or surrounding whitespace, if any."""
    for form in ("NFC", "NFD"):
        if is_file(Path(unicodedata.normalize(form, str(path)))):
            return _other_form(path, form)
    names = _names(os.fspath(path.absolute().parent)).get(_folded(path.name), ())
    for name in names:
        if unicodedata.normalize("NFC", name) == unicodedata.normalize("NFC", path.name):
            return _other_form(path, "NFD" if unicodedata.is_normalized("NFD", name) else "NFC")
    return f"the folder contains {printable_message(names[0])}; names must match exactly" if names else None


def _other_form(path: Path, form: str) -> str:
    own = "NFC" if form == "NFD" else "NFD"
    escaped = path.name.encode("unicode_escape").decode("ascii")
    return (
        f"an existing file differs only in Unicode normalization: its name is in {form}, the given name in "
        f"{own} ({escaped}); rename the file, for example with convmv, or normalize the given name with "
        f"unicodedata.normalize({form!r}, name)"
    )


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold().strip()


@lru_cache(maxsize=_MAX_FOLDERS)
def _names(folder: str) -> dict[str, list[str]]:
    """Return the file names in a folder, keyed by their `_folded` form."""
    names: dict[str, list[str]] = {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                names.setdefault(_folded(entry.name), []).append(entry.name)
    except (OSError, ValueError):
        pass
    return names
