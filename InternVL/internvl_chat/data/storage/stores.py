"""Images outside plain folders: in tar shards, in folders of object storage, or both."""

import contextlib
import functools
import io
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from internvl_chat.data.sources.problems import RecordError
from internvl_chat.data.storage.cache import image_cache
from internvl_chat.data.storage.manifest import (
    MANIFEST,
    Member,
    ShardIndex,
    check_shards,
    content_matches,
    has_shards,
    index_shards,
    normalized,
    read_manifest,
)
from internvl_chat.data.storage.name_table import NameTable
from internvl_chat.data.storage.transfer import FileState, download, file_state, list_files, retry_seconds
from internvl_chat.data.storage.urls import check_url, is_url
from internvl_chat.utils.errors import M3LLMError, StorageError, UsageError
from internvl_chat.utils.files import atomic_path, sha256
from internvl_chat.utils.logging import get_logger
from internvl_chat.utils.paths import default_cache

logger = get_logger(__name__)

# Maximum number of concurrent requests.
_THREADS = 16
# A folder is listed only if at least this many of its images are needed: a request lists 1,000 names, and the
# folder may contain many other images.
_MIN_LISTED = 1000
_ABSENT = FileState(-1, -1)


@dataclass(frozen=True)
class StoredImage:
    """An image in a store; used in place of the path to an image file."""

    store: "ImageStore"
    name: str

    def __str__(self) -> str:
        return f"{self.store.root}/{self.name}"

    def state(self) -> FileState:
        """Return the size and version of the image file.

        Raises:
            RecordError: the image does not exist.
            StorageError: the storage is unavailable.
        """
        return self.store.state(self.name)

    def read(self) -> bytes:
        """Return the content of the image file.

        Raises:
            RecordError: the image does not exist, or is damaged.
            StorageError: the storage is unavailable.
        """
        return self.store.read(self.name)

    def open(self) -> BinaryIO:
        """Return the content as a stream; see `read`."""
        return io.BytesIO(self.read())


class ImageStore(ABC):
    """Images of a dataset, keyed by name: their path in the records.

    Args:
        root: folder or URL.
        is_remote: whether reading an image sends a request.
    """

    def __init__(self, root: str, *, is_remote: bool) -> None:
        self.root, self.is_remote = root, is_remote

    def image(self, name: str) -> StoredImage:
        """Return an image without checking that it exists."""
        return StoredImage(self, normalized(name))

    @abstractmethod
    def state(self, name: str, *, retry: bool = True) -> FileState:
        """Return the size and version of an image; see `StoredImage.state`."""

    @abstractmethod
    def read(self, name: str, *, retry: bool = True) -> bytes:
        """Return the content of an image; see `StoredImage.read`."""

    def contains(self, name: str) -> bool:
        """Return whether an image is known to exist, without a request."""
        return False

    def states(self, names: Sequence[str]) -> np.ndarray:
        """Return the size and version of each image, (N, 2) int64; -1 for missing images."""

        def state(name: str) -> FileState:
            try:
                return self.state(normalized(name))
            except RecordError:
                return _ABSENT

        with ThreadPoolExecutor(_THREADS) as pool:
            return np.array(list(pool.map(state, names)), np.int64).reshape(-1, 2)

    def prefetch(self, names: Iterable[str]) -> None:
        """Download images into the cache concurrently; `read` reports those that cannot be downloaded."""
        if not self.is_remote or not image_cache().limit:
            return

        failed: list[StorageError] = []

        def fetch(name: str) -> None:
            if len(failed) >= _THREADS:  # an outage, in which each request waits until its timeout
                return
            try:
                self.read(name, retry=False)
            except StorageError as error:
                failed.append(error)
            except (M3LLMError, RecordError):
                pass

        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(fetch, dict.fromkeys(map(normalized, names))))

    def _missing(self, name: str) -> RecordError:
        return RecordError(
            f"the image {self.root}/{name} does not exist; check 'root' in the meta file",
            kind="image missing",
        )

    def _fetch(
        self,
        key: str,
        num_bytes: int,
        read: Callable[[], bytes],
        is_valid: Callable[[bytes], bool] = lambda _: True,
    ) -> bytes:
        """Return the content of an image from the cache; otherwise, read and cache it.

        Args:
            key: identifies the content.
            num_bytes: size of the image.
            read: downloads the image.
            is_valid: checks the cached content.
        """
        cache = image_cache()
        content = cache.get(key, num_bytes)
        if content is None or not is_valid(content):
            content = read()
            cache.put(key, content)
        return content


class ObjectStore(ImageStore):
    """A folder of object storage with one object per image.

    Args:
        root: URL.
    """

    def __init__(self, root: str) -> None:
        super().__init__(root, is_remote=True)
        self._known: list[NameTable] = []
        self._is_listed = False
        self._requested: dict[str, FileState] = {}

    def state(self, name: str, *, retry: bool = True) -> FileState:
        """Return the size and version of an image, with one request if they are not known."""
        state = self._known_state(name)
        if state is None and not self._is_listed:
            with contextlib.suppress(FileNotFoundError):
                state = self._requested[name] = file_state(f"{self.root}/{name}", retry=retry)
        if state is None:
            raise self._missing(name)
        return state

    def _known_state(self, name: str) -> FileState | None:
        if state := self._requested.get(name):
            return state
        row = next((row for table in self._known if (row := table.get(name))), None)
        return FileState(*row) if row else None

    def read(self, name: str, *, retry: bool = True) -> bytes:
        """Return the content of an image, with one request if its size and version are known."""
        state, url = self.state(name, retry=retry), f"{self.root}/{name}"
        if not state.num_bytes:
            return b""

        def read() -> bytes:
            try:
                content = download(url, 0, state.num_bytes, retry=retry)
            except FileNotFoundError:
                raise self._missing(name) from None
            if len(content) == state.num_bytes:
                return content
            message = f"the image {url} has changed since it was listed; run the command again"
            raise RecordError(message, kind="changed")

        return self._fetch(f"{url}\n{state.version}", state.num_bytes, read)

    def contains(self, name: str) -> bool:
        """Return whether an image is listed or was requested."""
        return self._known_state(normalized(name)) is not None

    def prepare(self, num_images: int) -> None:
        """List the folder if many images are needed, at most once per process."""
        if num_images < _MIN_LISTED or self._is_listed:
            return
        start = time.monotonic()
        found = list_files(self.root)
        self._known.append(NameTable(found, np.array(list(found.values()), np.int64).reshape(-1, 2)))
        self._is_listed = True
        logger.info("%s: %d files listed in %.0f s", self.root, len(found), time.monotonic() - start)

    def remember(self, names: Sequence[str], states: np.ndarray) -> None:
        """Store the sizes and versions of images, (N, 2) int64, which saves a request per image."""
        if not self._is_listed:
            rows = {normalized(name): row for row, name in enumerate(names)}
            self._known.append(NameTable(rows, states[list(rows.values())].reshape(-1, 2)))


class ShardStore(ImageStore):
    """A folder of tar shards, local or in object storage.

    Args:
        root: folder or URL.
        index: index of the shards.
        is_remote: whether the root is a URL.
    """

    def __init__(self, root: str, index: ShardIndex, *, is_remote: bool) -> None:
        super().__init__(root, is_remote=is_remote)
        self.index = index

    def _member(self, name: str) -> Member:
        member = self.index.get(name)
        if member is None:
            raise RecordError(
                f"the image {name} is in none of the {len(self.index.shards)} tar shards in {self.root}; "
                "check 'root' in the meta file (image files next to tar shards are not read)",
                kind="image missing",
            )
        return member

    def state(self, name: str, *, retry: bool = True) -> FileState:
        """Return the size and version of an image from the index."""
        member = self._member(name)
        return FileState(member.num_bytes, member.version)

    def read(self, name: str, *, retry: bool = True) -> bytes:
        """Return the content of an image: read it from its shard, or request its range of the shard."""
        member = self._member(name)
        if not member.num_bytes:
            return b""
        if member.sha256 is None or not self.is_remote:
            return self._read_shard(name, member, retry)
        read = functools.partial(self._read_shard, name, member, retry)
        return self._fetch(member.sha256, member.num_bytes, read, lambda c: content_matches(c, member))

    def _read_shard(self, name: str, member: Member, retry: bool) -> bytes:
        shard = f"{self.root}/{member.shard}"
        problem = "differs from its manifest"
        try:
            if self.is_remote:
                content = download(shard, member.offset, member.num_bytes, retry=retry)
            else:
                with Path(shard).open("rb", buffering=0) as stream:
                    stream.seek(member.offset)
                    content = stream.read(member.num_bytes)
            if content_matches(content, member):
                return content
        except OSError as error:
            problem = f"cannot be read ({error.strerror or type(error).__name__})"
        raise RecordError(
            f"the image {self.root}/{name} is damaged: the shard {member.shard} {problem}; copy the shard "
            "again, or write the shards again with m3llm data shard", kind="image unreadable",
        )  # fmt: skip

    def contains(self, name: str) -> bool:
        """Return whether an image is in a shard."""
        return self.index.get(normalized(name)) is not None


def open_root(root: Path | str) -> Path | ImageStore:
    """Return the images of a dataset: the folder itself, or a store for shards and URLs.

    Args:
        root: folder of images or shards, manifest file, or URL of one of these.

    Raises:
        DataError: the shards are damaged or incomplete.
        StorageError: the storage is unavailable.
    """
    if isinstance(root, str):
        return _open_url(check_url(root).removesuffix(f"/{MANIFEST}"))
    folder = root.parent if root.name == MANIFEST else root
    return ShardStore(str(folder), index_shards(folder), is_remote=False) if has_shards(folder) else root


@functools.lru_cache(maxsize=64)
def _open_url(root: str) -> ImageStore:
    image_cache(), retry_seconds()  # report invalid settings here, not in a dataloader worker
    try:
        manifest = fetch_file(f"{root}/{MANIFEST}")
    except FileNotFoundError:
        return ObjectStore(root)
    index = read_manifest(manifest, f"{root}/{MANIFEST}")
    found = list_files(root, nested=False)
    check_shards(root, index.shards, {name: state.num_bytes for name, state in found.items()})
    return ShardStore(root, index, is_remote=True)


def parse_root(text: str | Path) -> Path | str:
    """Return a dataset's `root` as a valid URL or a path.

    Raises:
        DataError: the URL is invalid.
    """
    return check_url(text) if isinstance(text, str) and is_url(text) else Path(text).expanduser()


def fetch_file(url: str) -> Path:
    """Download a file from object storage to `files` in the cache folder; return its path there.

    The file is downloaded again only if it has changed.

    Raises:
        FileNotFoundError: there is no such file.
        StorageError: the storage is unavailable.
        UsageError: the cache folder cannot be written.
    """
    state = file_state(url)
    folder = default_cache() / "files" / sha256(f"{url}\n{state}".encode())[:16]
    file = folder / url.rpartition("/")[2]
    if not file.is_file() or file.stat().st_size != state.num_bytes:
        content = download(url, 0, state.num_bytes) if state.num_bytes else b""
        if len(content) != state.num_bytes:
            raise StorageError(f"{url} changed while it was downloaded; run the command again")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_path(file) as partial:
                partial.write_bytes(content)
        except OSError as error:
            raise UsageError(
                f"{url} cannot be stored in the cache: {error}; set M3LLM_CACHE to a different folder"
            ) from None
    return file
