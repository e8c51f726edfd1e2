"""Weight files on disk as lazy tensors, so that formats convert and merge without holding a model.

A `Weights` maps each parameter's name to a function that reads it. No pickle is ever executed.
"""

import functools
import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from internvl_chat.utils.errors import ModelError

Weights = dict[str, Callable[[], torch.Tensor]]

SHARD_BYTES = 5 * 10**9
INDEX_FILE = "model.safetensors.index.json"
_PATTERNS = ("model*.safetensors", "pytorch_model*.bin")


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


def write_weights(weights: Weights, folder: Path, *, max_shard_bytes: int = SHARD_BYTES) -> None:
    """Write `model.safetensors`, or shards and an index, holding one shard in memory at a time.

    Args:
        weights: the tensors by name.
        folder: an existing folder.
        max_shard_bytes: a shard is closed before it would grow beyond this.
    """
    earlier = [*folder.glob(_PATTERNS[0]), *folder.glob(_PATTERNS[1]), *folder.glob("*.index.json")]
    shards: list[list[str]] = []
    total = 0
    for names, shard in _shards(weights, max_shard_bytes):
        total += sum(t.nbytes for t in shard.values())
        shards.append(names)
        write_file(shard, folder / _part(len(shards)))
        shard.clear()
    for file in earlier:  # or a reader would mix them with the new ones
        file.unlink()
    if len(shards) == 1:
        (folder / _part(1)).rename(folder / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shards, 1):
        final = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / _part(number)).rename(folder / final)
        weight_map.update(dict.fromkeys(names, final))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")


def write_file(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Write one safetensors file that others may read (the library makes it private to its owner)."""
    save_file(tensors, file, metadata={"format": "pt"})
    umask = os.umask(0)
    os.umask(umask)
    file.chmod(0o666 & ~umask)


def _part(number: int) -> str:
    return f"part-{number:05d}.safetensors"


def _shards(weights: Weights, max_bytes: int) -> Iterable[tuple[list[str], dict[str, torch.Tensor]]]:
    """Yield the tensors in groups of at most `max_bytes` (one tensor may be larger)."""
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, read in weights.items():
        tensor = read().detach().cpu().contiguous()
        if shard and size + tensor.nbytes > max_bytes:
            yield list(shard), shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield list(shard), shard
