"""Read weight files lazily and write them in shards, so that conversions do not need memory for a full model.

`Weights` maps parameter names to functions that read the tensor. Pickles are loaded with `weights_only`.
"""

import functools
import hashlib
import json
import math
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from internvl_chat.utils.errors import ModelError
from internvl_chat.utils.files import file_sha256, write_json
from internvl_chat.utils.hashed_file import FileEntry, HashedFile

Weights = dict[str, Callable[[], torch.Tensor]]

SHARD_BYTES = 5 * 10**9
INDEX_FILE = "model.safetensors.index.json"
_PATTERNS = ("model*.safetensors", "pytorch_model*.bin")
_MAX_LISTED = 5
# In the order in which safetensors stores tensors: large elements first, so that all tensors are aligned.
_DTYPES = {
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.uint32: "U32",
    torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint16: "U16", torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip


def weight_files(folder: Path) -> list[Path]:
    """Return a folder's safetensors files, sorted by name; if there are none, its PyTorch weight files.

    Raises:
        ModelError: the folder has no weight files, or the index lists a missing file.
    """
    for pattern in _PATTERNS:
        files = sorted(folder.glob(pattern))
        if files:
            _require_complete(folder, {f.name for f in files})
            return files
    raise ModelError(
        f"{folder}: no weights (model*.safetensors or pytorch_model*.bin); is the download complete?"
    )


def _require_complete(folder: Path, names: set[str]) -> None:
    """Raise a `ModelError` if a shard listed in the index is missing."""
    for index in folder.glob("*.index.json"):
        expected = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if expected & names and expected - names:
            raise ModelError(
                f"{folder}: {index.name} lists missing files: {', '.join(sorted(expected - names))}"
            )


def read_weights(folder: Path) -> Weights:
    """Open the weight files of a folder; tensors are read on demand.

    Raises:
        ModelError: there are no weight files, a shard is missing, or a file is damaged.
    """
    weights: Weights = {}
    for file in weight_files(folder):
        weights.update(open_weights(file))
    return weights


def open_weights(file: Path) -> Weights:
    """Open one weight file; tensors are read on demand.

    Raises:
        ModelError: the file is damaged.
    """
    try:
        if file.suffix == ".bin":
            # Files written before PyTorch 1.6 are not zip files and cannot be memory-mapped.
            zipped = zipfile.is_zipfile(file)
            tensors = torch.load(file, map_location="cpu", mmap=zipped, weights_only=True)
            return {name: partial(tensors.get, name) for name in tensors}
        with safe_open(file, framework="pt") as handle:
            return {name: partial(_read_tensor, file, name) for name in handle.keys()}  # noqa: SIM118
    except Exception as error:
        raise ModelError(f"{file}: damaged or not a weight file: {error}") from error


def _read_tensor(file: Path, name: str) -> torch.Tensor:
    """Read one tensor through a separate memory mapping.

    If all tensors shared a mapping, all tensors read so far would stay in memory.
    """
    with safe_open(file, framework="pt") as handle:
        return handle.get_tensor(name)


def describe_non_finite(tensor: torch.Tensor) -> str | None:
    """Return the number of NaN and Inf values in a tensor as text; None if all values are finite.

    `aminmax` reads the tensor once without copying it, which takes a few percent of the loading time.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return None
    if tensor.itemsize == 1:  # `aminmax` does not support float8
        tensor = tensor.float()
    low, high = tensor.aminmax()
    if math.isfinite(low) and math.isfinite(high):
        return None
    nan, total = int(tensor.isnan().sum()), tensor.numel()
    infinite = int(tensor.isinf().sum())
    found = [f"{count:,} {name}" for count, name in ((nan, "NaN"), (infinite, "Inf")) if count]
    return f"{' and '.join(found)} in {total:,} values"


def check_finite(weights: Weights, source: Path) -> Weights:
    """Return the same weights, but check each tensor for NaN and Inf when it is read.

    Args:
        weights: weights to check.
        source: folder or file of the weights, for error messages.

    Raises:
        ModelError: a tensor contains NaN or Inf (raised when the tensor is read).
    """

    return {name: partial(_read_finite, name, read, source) for name, read in weights.items()}


def _read_finite(name: str, read: Callable[[], torch.Tensor], source: Path) -> torch.Tensor:
    tensor = read()
    if (problem := describe_non_finite(tensor)) is not None:
        raise non_finite_error(source, [f"{name} ({problem})"])
    return tensor


def non_finite_error(source: Path | str, tensors: Sequence[str]) -> ModelError:
    """Return an error that lists the weights that contain NaN or Inf.

    Args:
        source: folder or file of the weights.
        tensors: description of each of these weights.
    """
    more = f" and {len(tensors) - _MAX_LISTED} more" if len(tensors) > _MAX_LISTED else ""
    noun = "1 weight is" if len(tensors) == 1 else f"{len(tensors)} weights are"
    return ModelError(
        f"{source}: {noun} not finite: {', '.join(tensors[:_MAX_LISTED])}{more}. The file is damaged or "
        "training diverged; copy the checkpoint again or use an earlier one"
    )


def assign_weights(model: nn.Module, weights: Weights, *, source: Path, partial: bool = False) -> None:
    """Load weights into a module one by one, converting each to the dtype of its parameter.

    Args:
        model: module to load the weights into.
        weights: weights under the module's parameter names.
        source: folder or file of the weights, for error messages.
        partial: whether weights may be missing.

    Raises:
        ModelError: weights are missing, unexpected, of the wrong shape, or not finite.
    """
    own = dict(model.state_dict(keep_vars=True))
    tied = {name for name, p in own.items() if any(p is q for loaded, q in own.items() if loaded in weights)}
    missing = [] if partial else sorted(own.keys() - weights.keys() - tied)
    unexpected = sorted(weights.keys() - own.keys())
    mismatched, non_finite = [], []
    for name in sorted(weights.keys() & own.keys()):
        tensor, target = weights[name](), own[name]
        if tensor.shape != target.shape:
            mismatched.append(f"{name} {tuple(tensor.shape)} instead of {tuple(target.shape)}")
            continue
        target.data = tensor.to(target.dtype)  # keeps the parameter object, so tied weights stay tied
        if (problem := describe_non_finite(target.data)) is not None:
            cast = (
                ""
                if describe_non_finite(tensor)
                else f" after conversion from {tensor.dtype} to {target.dtype}"
            )
            non_finite.append(f"{name} ({problem}{cast})")
    problems = [
        f"{len(names)} {kind} weight(s), e.g. {', '.join(names[:3])}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("mismatched", mismatched))
        if names
    ]
    if problems:
        raise ModelError(f"{source}: the weights do not match config.json: {'; '.join(problems)}")
    if non_finite:
        raise non_finite_error(source, non_finite)


def weights_digest(folder: Path) -> str:
    """Return a SHA-256 over the names and contents of a folder's weight files."""
    total = hashlib.sha256()
    for file in weight_files(folder):
        state = file.stat()
        total.update(f"{file.name}:{_file_digest(file, state.st_size, state.st_mtime_ns)}\n".encode())
    return total.hexdigest()


@functools.lru_cache(maxsize=256)
def _file_digest(file: Path, size: int, modified: int) -> str:
    """Return the SHA-256 of a file, cached by path, size and modification time (hashing a model is slow)."""
    return file_sha256(file)


def write_weights(
    weights: Weights, folder: Path, *, max_shard_bytes: int = SHARD_BYTES
) -> dict[str, FileEntry]:
    """Write `model.safetensors`, or shards and an index, with one shard in memory at a time.

    Args:
        weights: weights to write.
        folder: existing folder; its previous weight files are replaced.
        max_shard_bytes: maximum size of a shard in bytes; a larger tensor gets a separate shard.

    Returns:
        Size and hash of each safetensors file, keyed by file name.
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
    for file in earlier:  # otherwise a reader would mix them with the new files
        file.unlink()
    if len(shards) == 1:
        (folder / _part(1)).rename(folder / "model.safetensors")
        return {"model.safetensors": written[0]}
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    weight_map: dict[str, str] = {}
    for number, (names, name) in enumerate(zip(shards, files, strict=True), 1):
        (folder / _part(number)).rename(folder / name)
        weight_map.update(dict.fromkeys(names, name))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / INDEX_FILE, index)
    return dict(zip(files, written, strict=True))


def write_file(
    tensors: Mapping[str, torch.Tensor],
    file: Path,
    *,
    metadata: Mapping[str, str] | None = None,
) -> FileEntry:
    """Write a safetensors file with the same layout as the safetensors library; return its size and hash.

    Tensors are copied to the host one at a time.

    Args:
        tensors: tensors on any device, keyed by name.
        file: file to write or replace; tensors mapped from the old file stay valid.
        metadata: additional metadata for the header.
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
    with HashedFile(file) as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            copy = tensors[name].detach().cpu().contiguous()
            stream.write(copy.reshape(-1).view(torch.uint8).numpy().data)
            del copy
    return stream.entry()


def _part(number: int) -> str:
    return f"part-{number:05d}.safetensors"


def _shards(weights: Weights, max_bytes: int) -> Iterable[dict[str, torch.Tensor]]:
    """Yield the tensors in groups of at most `max_bytes`; a larger tensor gets a separate group."""
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
