"""Requests to object storage, repeated with exponential backoff and jitter while it is unavailable."""

import errno
import hashlib
import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from internvl_chat.data.storage.urls import filesystem, redact
from internvl_chat.utils.errors import M3LLMError, StorageError, UsageError
from internvl_chat.utils.logging import get_logger
from internvl_chat.utils.text import counted

if TYPE_CHECKING:
    from tenacity import RetryCallState

logger = get_logger(__name__)

T = TypeVar("T")

_RETRY_SECONDS = 300
_MAX_WAIT = 30
# Errors for wrong or missing credentials in botocore, by name, because botocore is optional.
_CREDENTIAL_ERRORS = (
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError",
    "SSOTokenLoadError", "UnauthorizedSSOTokenError", "ProfileNotFound", "NoRegionError",
)  # fmt: skip
_BUGS = (AttributeError, TypeError, NameError, AssertionError)
# Fields that change with the content of a file, most specific first; each file system provides some of them.
_VERSIONS = ("ETag", "etag", "md5Hash", "blob_id", "LastModified", "last_modified", "updated", "mtime")


class FileState(NamedTuple):
    """Size of a file, and a number that changes with its content."""

    num_bytes: int
    version: int


def retry_seconds() -> float:
    """Return how long failed requests are repeated, in seconds: `$M3LLM_RETRY_SECONDS`, or 300.

    Raises:
        UsageError: the variable is not a number of seconds.
    """
    return env_number("M3LLM_RETRY_SECONDS", _RETRY_SECONDS, "a number of seconds")


def env_number(variable: str, default: float, expected: str) -> float:
    """Return the non-negative number in an environment variable.

    Args:
        variable: name of the variable.
        default: value if the variable is not set.
        expected: description of valid values, for the message.

    Raises:
        UsageError: the variable is not a non-negative number.
    """
    text = os.environ.get(variable, "").strip() or str(default)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise UsageError(f"{variable} is {text!r:.80}; it must be {expected}")
    return value


def request(name: str, action: Callable[[], T], *, retry: bool = True) -> T:
    """Call a function that sends a request; repeat it while the storage is unavailable.

    Args:
        name: URL, also for messages.
        action: sends the request and returns its result.
        retry: whether to repeat failed requests, for up to `retry_seconds()`.

    Raises:
        FileNotFoundError: there is no such file.
        StorageError: access is denied, or all attempts failed.
    """
    filesystem(name)  # a missing package is reported here
    from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

    seconds = retry_seconds() if retry else 0
    attempts = Retrying(
        retry=retry_if_exception(_is_transient),
        wait=wait_random_exponential(multiplier=1, max=_MAX_WAIT),
        stop=stop_after_delay(seconds),
        before_sleep=partial(_log_retry, name),
        reraise=True,
    )
    try:
        return attempts(action)
    except (M3LLMError, FileNotFoundError, *_BUGS):
        raise
    except (IsADirectoryError, NotADirectoryError):
        raise FileNotFoundError(name) from None
    except Exception as error:
        raise StorageError(_describe(name, error, attempts.statistics)) from None


def _is_transient(error: BaseException) -> bool:
    permanent = (M3LLMError, FileNotFoundError, IsADirectoryError, NotADirectoryError, *_BUGS)
    return isinstance(error, Exception) and not isinstance(error, permanent) and not _is_denied(error)


def _is_denied(error: Exception) -> bool:
    return isinstance(error, PermissionError | ValueError) or type(error).__name__ in _CREDENTIAL_ERRORS


def _describe(name: str, error: Exception, statistics: Mapping[str, Any]) -> str:
    reason = redact(f"{error}" or type(error).__name__)
    if _is_denied(error):
        return (
            f"{name} cannot be read: {reason}; check the URL, and the credentials in the environment or in "
            "the profile, then run the same command again"
        )
    attempts, seconds = (
        counted(statistics["attempt_number"], "attempt"),
        statistics["delay_since_first_attempt"],
    )
    return (
        f"{name} cannot be read after {attempts} in {seconds:.0f} s: {reason}; check the network "
        "and the storage, then run the same command again (training resumes from the newest checkpoint). "
        "M3LLM_RETRY_SECONDS sets how long requests are repeated"
    )


def _log_retry(name: str, state: "RetryCallState") -> None:
    """Log only attempts 1, 2, 4, 8, ..., because many workers may wait at the same time."""
    number = state.attempt_number
    if number & number - 1 or state.outcome is None or state.next_action is None:
        return
    reason = redact(str(state.outcome.exception()))
    logger.warning(
        "%s: attempt %d failed (%s); next in %.1f s", name, number, reason, state.next_action.sleep
    )


def download(url: str, start: int, num_bytes: int, *, retry: bool = True) -> bytes:
    """Return `num_bytes` bytes of a file from offset `start` (fewer at its end), with one request.

    Raises:
        FileNotFoundError: there is no such file.
        StorageError: it cannot be read; see `request`.
    """

    def read() -> bytes:
        try:
            return filesystem(url).cat_file(url, start=start, end=start + num_bytes)
        except OSError as error:
            if error.errno == errno.EINVAL:  # the file ends before the range starts
                return b""
            raise

    return request(url, read, retry=retry)


def file_state(url: str, *, retry: bool = True) -> FileState:
    """Return the size and version of a file, with one request.

    Raises:
        FileNotFoundError: there is no such file.
        StorageError: it cannot be read; see `request`.
    """
    entry = request(url, lambda: filesystem(url).info(url), retry=retry)
    if entry["type"] != "file":
        raise FileNotFoundError(url)
    return _state(entry)


def list_files(url: str, *, nested: bool = True) -> dict[str, FileState]:
    """Return the size and version of each file in a folder, with one request per thousand files.

    The keys are paths relative to the folder. A folder that does not exist is empty.

    Args:
        url: the folder.
        nested: whether to include files in subfolders.

    Raises:
        StorageError: it cannot be read; see `request`.
    """
    maxdepth = None if nested else 1
    try:
        entries = request(url, lambda: filesystem(url).find(url, maxdepth=maxdepth, detail=True))
    except FileNotFoundError:
        return {}
    prefix = f"{url.partition('://')[2]}/"
    return {path.removeprefix(prefix): _state(entry) for path, entry in entries.items()}


def _state(entry: Mapping[str, Any]) -> FileState:
    version = next((str(entry[field]) for field in _VERSIONS if entry.get(field)), "")
    return FileState(int(entry["size"] or 0), hash63(version.encode()))


def hash63(content: bytes) -> int:
    """Return a 63-bit hash, which is non-negative as an int64."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()) >> 1
