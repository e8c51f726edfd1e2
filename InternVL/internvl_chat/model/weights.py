"""Weight files on disk as lazy tensors, so that formats convert and merge without holding a model.

A `Weights` maps each parameter's name to a function that reads it. No pickle is ever executed.
"""

import functools
import hashlib
import json
import zipfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from internvl_chat.utils.errors import ModelError
from internvl_chat.utils.hashed_file import FileEntry, HashedFile, Pause, no_pause

Weights = dict[str, Callable[[], torch.Tensor]]

SHARD_BYTES = 5 * 10**9
INDEX_FILE = "model.safetensors.index.json"
_PATTERNS = ("model*.safetensors", "pytorch_model*.bin")
# In the order in which safetensors stores them: large elements first, so that all are aligned.
_DTYPES = {
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.uint32: "U32",
    torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint16: "U16", torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip


def weight_files(folder: Path) -> list[Path]:
    """Return the model's weight files in order of name: safetensors, or else PyTorch's.

    Raises:
        ModelError: there are none, or the index names one that is missing.
    """
    for pattern in _PATTERNS:
        files = sorted(folder.glob(pattern))
        if files:
            _require_complete(folder, {f.name for f in files})
            return files
    raise ModelError(f"{folder}: no weights (*.safetensors or pytorch_model*.bin); is the download complete?")


def _require_complete(folder: Path, found: set[str]) -> None:
    """Check the shards against the index, where there is one."""
    for index in folder.glob("*.index.json"):
        expected = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if expected & found and expected - found:
            raise ModelError(
                f"{folder}: {index.name} names missing files: {', '.join(sorted(expected - found))}"
            )


def read_weights(folder: Path) -> Weights:
    """Open the weight files of a folder; tensors are read when asked for.

    Raises:
        ModelError: no weights, a missing shard, or a damaged file.
    """
    weights: Weights = {}
    for file in weight_files(folder):
        weights.update(open_weights(file))
    return weights


def open_weights(file: Path) -> Weights:
    """Open one weight file.

    Raises:
        ModelError: the file is damaged.
    """
    try:
        if file.suffix == ".bin":
            zipped = zipfile.is_zipfile(file)  # files of PyTorch before 1.6 are not, and cannot be mapped
            tensors = torch.load(file, map_location="cpu", mmap=zipped, weights_only=True)
            return {name: partial(tensors.get, name) for name in tensors}
        with safe_open(file, framework="pt") as handle:
            return {name: partial(_read_tensor, file, name) for name in handle.keys()}  # noqa: SIM118
    except Exception as error:
        raise ModelError(f"{file}: damaged or not a weight file: {error}") from error


def _read_tensor(file: Path, name: str) -> torch.Tensor:
    """Read one tensor; the file is mapped for as long as the tensor lives, and no longer.

    One mapping for all tensors would keep in memory whatever was read through it.
    """
    with safe_open(file, framework="pt") as handle:
        return handle.get_tensor(name)


def assign_weights(model: nn.Module, weights: Weights, *, source: Path, partial: bool = False) -> None:
    """Give a module its weights one by one, each in the dtype of the parameter that it replaces.

    Args:
        model: receives the weights.
        weights: under the module's names.
        source: named in errors.
        partial: accept that some of the module's weights are not given.
    """
    own = dict(model.state_dict(keep_vars=True))
    tied = {name for name, p in own.items() if any(p is q for other, q in own.items() if other in weights)}
    missing = [] if partial else sorted(own.keys() - weights.keys() - tied)
    unexpected = sorted(weights.keys() - own.keys())
    misshapen = []
    for name in weights.keys() & own.keys():
        tensor, target = weights[name](), own[name]
        if tensor.shape != target.shape:
            misshapen.append(f"{name} {tuple(tensor.shape)} for {tuple(target.shape)}")
            continue
        target.data = tensor.to(target.dtype)  # the parameter itself stays, and with it a tied head
    problems = [
        f"{len(names)} {kind} weight(s), e.g. {', '.join(names[:3])}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if names
    ]
    if problems:
        raise ModelError(f"{source}: does not fit its config.json: {'; '.join(problems)}")


def weights_digest(folder: Path) -> str:
    """Return the SHA-256 over the names and contents of a folder's weight files."""
    total = hashlib.sha256()
    for file in weight_files(folder):
        state = file.stat()
        total.update(f"{file.name}:{_file_digest(file, state.st_size, state.st_mtime_ns)}\n".encode())
    return total.hexdigest()


@functools.lru_cache(maxsize=256)
def _file_digest(file: Path, size: int, modified: int) -> str:
    """Hash a file, once in the life of a process unless it changes: a large base takes many seconds."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_weights(
    weights: Weights, folder: Path, *, max_shard_bytes: int = SHARD_BYTES
) -> dict[str, FileEntry]:
    """Write `model.safetensors`, or shards and an index, holding one shard in memory at a time.

    Args:
        weights: the tensors by name.
        folder: an existing folder.
        max_shard_bytes: a shard is closed before it would grow beyond this.

    Returns:
        The size and hash of each safetensors file, by name.
    """
    earlier = [*folder.glob(_PATTERNS[0]), *folder.glob(_PATTERNS[1]), *folder.glob("*.index.json")]
    shards: list[list[str]] = []
    written: list[FileEntry] = []
    total = 0
    for shard in _shards(weights, max_shard_bytes):
        total += sum(t.nbytes for t in shard.values())
        shards.append(list(shard))
        written.append(write_file(shard, folder / _part(len(shards))))
        shard.clear()
    for file in earlier:  # or a reader would mix them with the new ones
        file.unlink()
    if len(shards) == 1:
        (folder / _part(1)).rename(folder / "model.safetensors")
        return {"model.safetensors": written[0]}
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    weight_map = {}
    for number, (names, file) in enumerate(zip(shards, files, strict=True), 1):
        (folder / _part(number)).rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")
    return dict(zip(files, written, strict=True))


def write_file(
    tensors: Mapping[str, torch.Tensor],
    file: Path,
    *,
    metadata: Mapping[str, str] | None = None,
    pause: Pause = no_pause,
) -> FileEntry:
    """Write one safetensors file, laid out as by the library; returns its size and hash.

    Tensors are copied to the host one at a time.

    Args:
        tensors: on any device.
        file: is replaced if it exists; tensors that are mapped from it stay valid.
        metadata: of the header, beside the format.
        pause: as for `HashedFile`.
    """
    dtypes = list(_DTYPES)
    names = sorted(tensors, key=lambda name: (dtypes.index(tensors[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.unlink(missing_ok=True)
    with HashedFile(file, pause) as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            copy = tensors[name].detach().cpu().contiguous()
            stream.write(memoryview(copy.reshape(-1).view(torch.uint8).numpy()))
            del copy
    return stream.entry()


def _part(number: int) -> str:
    return f"part-{number:05d}.safetensors"


def _shards(weights: Weights, max_bytes: int) -> Iterable[dict[str, torch.Tensor]]:
    """Yield the tensors in groups of at most `max_bytes` (one tensor may be larger)."""
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, read in weights.items():
        tensor = read()
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard
