"""URLs of object storage: checks, removal of secrets from messages, and fsspec file systems."""

import os
import re
from functools import cache
from importlib.util import find_spec
from typing import Any

from internvl_chat.utils.errors import DataError, UsageError

# Supported schemes -> package with the fsspec file system, and the command that installs it.
_SCHEMES = {
    "s3": ("s3fs", "pip install 'm3llm[remote]'"),
    "gs": ("gcsfs", "pip install gcsfs"),
    "hf": ("huggingface_hub", "pip install 'm3llm[remote]'"),
}
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.ASCII | re.DOTALL)
_USER = re.compile(r"(?<=://)[^/?#\s'\"]*@")
_QUERY = re.compile(r"(://[^\s?'\"<>]*)\?[^\s'\"<>]*")
_SECRET_VARIABLES = (
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN",
)  # fmt: skip
_MIN_SECRET = 8


def is_url(text: str) -> bool:
    """Return whether a text is a URL, such as `s3://bucket/folder`, with any scheme.

    >>> is_url("s3://bucket/folder"), is_url("/data/images"), is_url("C:/images")
    (True, False, False)
    """
    return _URL.match(text) is not None


def check_url(url: str) -> str:
    """Check a URL of object storage; return it with a lowercase scheme and without trailing slashes.

    Raises:
        DataError: the scheme is not supported, the bucket is missing, or the URL contains credentials.
    """
    match = _URL.match(url)
    scheme, path = (match[1].lower(), match[2]) if match else ("", url)
    shown = redact(url)
    if scheme == "file":
        raise DataError(f"{shown}: give the path without file://")
    if scheme not in _SCHEMES:
        names = ", ".join(f"{name}://" for name in _SCHEMES)
        raise DataError(f"{shown}: the scheme is not one of {names}")
    if "@" in path.partition("/")[0] or "?" in path or "#" in path:
        raise DataError(
            f"{shown}: a URL must not contain credentials or options; set them in the environment, for "
            "example AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or in a profile"
        )
    if not path.strip("/"):
        raise DataError(f"{shown}: the bucket is missing")
    return f"{scheme}://{path.strip('/')}"


def redact(text: str) -> str:
    """Remove credentials from a message: user names, passwords and queries in URLs, and known secrets.

    >>> redact("GET https://me:secret@host/a.jpg?X-Amz-Signature=12 failed")
    'GET https://***@host/a.jpg?*** failed'
    """
    for name in _SECRET_VARIABLES:
        if len(value := os.environ.get(name, "")) >= _MIN_SECRET:
            text = text.replace(value, "***")
    return _QUERY.sub(r"\1?***", _USER.sub("***@", text))


def filesystem(url: str) -> Any:
    """Return the fsspec file system for a URL, which is created once per process and scheme.

    Raises:
        UsageError: a required package is not installed.
    """
    return _filesystem(url.partition("://")[0], os.getpid())


@cache
def _filesystem(scheme: str, _process: int) -> Any:
    """Return a file system. Each process needs its own: a fork cannot use that of its parent."""
    package, command = _SCHEMES[scheme]
    for name, fix in ((package, command), ("tenacity", "pip install 'm3llm[remote]'")):
        if find_spec(name) is None:
            raise UsageError(f"{scheme}:// URLs require {name}: {fix}")
    import fsspec

    # A listing cached in the process would hide changes and keep all names in memory.
    options: dict[str, Any] = {"use_listings_cache": False}
    if scheme != "s3":
        return fsspec.filesystem(scheme, **options)
    # The retries of botocore and s3fs would delay the message about a failure, by minutes if the storage does
    # not answer. `transfer.request` repeats requests instead.
    user = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    options["config_kwargs"] = {"retries": {"max_attempts": 0}, **user}
    storage = fsspec.filesystem(scheme, **options)
    storage.retries = 1
    return storage
