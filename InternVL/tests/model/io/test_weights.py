"""Weight files: shards, damaged files, pickles, digests and permissions."""

import hashlib
import json
import math
import os
import pickle
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from internvl_chat.model.io import weights
from internvl_chat.model.io.weights import (
    INDEX_FILE,
    Weights,
    assign_weights,
    check_finite,
    describe_non_finite,
    open_weights,
    read_weights,
    weight_files,
    weights_digest,
    write_file,
    write_weights,
)
from internvl_chat.utils.errors import ModelError
from internvl_chat.utils.hashed_file import FileEntry


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    found = {f"layers.{i}.weight": torch.randn(4, 5, generator=rng) for i in range(6)}
    found["half"] = torch.randn(7, generator=rng).bfloat16()
    found["ids"] = torch.arange(3)
    found["scalar"] = torch.tensor(2.5)
    found["turned"] = torch.randn(3, 4, generator=rng).T
    return found


def lazy(given: dict[str, torch.Tensor]) -> Weights:
    return {name: lambda t=tensor: t for name, tensor in given.items()}


def assert_same(found: Weights, expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, read in found.items():
        assert read().dtype == expected[name].dtype, name
        same = torch.equal(read(), expected[name])
        assert same, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
@pytest.mark.parametrize(("value", "name"), [(math.nan, "NaN"), (math.inf, "Inf"), (-math.inf, "Inf")])
def test_non_finite_value_is_described(dtype: torch.dtype, value: float, name: str) -> None:
    tensor = torch.ones(3, 5)
    assert describe_non_finite(tensor.to(dtype)) is None
    tensor[1, 2] = value
    assert describe_non_finite(tensor.to(dtype).T) == f"1 {name} in 15 values"


def test_finite_values_pass() -> None:
    large = torch.full((3000,), torch.finfo(torch.float16).max, dtype=torch.float16)  # the sum overflows
    for tensor in (large, -large, torch.zeros(0), torch.arange(3), torch.tensor(True), torch.tensor(0.0)):
        assert describe_non_finite(tensor) is None


def test_checked_weights_are_read_on_demand(tmp_path: Path) -> None:
    given = tensors()
    given["half"][2:4] = torch.tensor([math.nan, math.inf])
    read = check_finite(lazy(given), tmp_path)
    assert torch.equal(read["turned"](), given["turned"])
    with pytest.raises(ModelError, match=r"1 weight is not finite: half \(1 NaN and 1 Inf in 7 values\)"):
        read["half"]()


def test_all_non_finite_weights_are_reported_while_loading(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    given = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    given["0.bias"][1], given["1.weight"][0, 2] = math.inf, math.nan
    with pytest.raises(ModelError) as caught:
        assign_weights(module, lazy(given), source=tmp_path)
    assert f"{tmp_path}: 2 weights are not finite: 0.bias (1 Inf in 3 values), 1.weight (1 NaN" in str(
        caught.value
    )


def test_overflow_in_a_conversion_is_reported(tmp_path: Path) -> None:
    module = nn.Linear(2, 1, bias=False, dtype=torch.float16)
    with pytest.raises(ModelError, match=r"after conversion from torch\.float32 to torch\.float16"):
        assign_weights(module, lazy({"weight": torch.tensor([[1.0, 1e6]])}), source=tmp_path)


def test_single_file_round_trip(tmp_path: Path) -> None:
    write_weights(lazy(tensors()), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]
    assert_same(read_weights(tmp_path), tensors())
    assert load_file(tmp_path / "model.safetensors").keys() == tensors().keys()


@pytest.mark.parametrize(("limit", "shards"), [(170, 5), (1, 10), (80, 8), (10**6, 1)])
def test_shards_round_trip(tmp_path: Path, limit: int, shards: int) -> None:
    write_weights(lazy(tensors()), tmp_path, max_shard_bytes=limit)
    files = weight_files(tmp_path)
    assert_same(read_weights(tmp_path), tensors())
    if shards == 1:
        assert [f.name for f in files] == ["model.safetensors"]
        return
    assert [f.name for f in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    total = sum(t.numel() * t.element_size() for t in tensors().values())
    assert index["metadata"]["total_size"] == total
    contents = {file.name: load_file(file) for file in files}
    assert index["weight_map"] == {name: file for file, held in contents.items() for name in held}
    for held in contents.values():
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= limit
    assert {p.name for p in tmp_path.iterdir()} == {*contents, INDEX_FILE}


def test_shards_are_filled(tmp_path: Path) -> None:
    given = {name: torch.zeros(10) for name in "abcde"}
    write_weights(lazy(given), tmp_path, max_shard_bytes=80)
    held = [sorted(load_file(file)) for file in weight_files(tmp_path)]
    assert held == [["a", "b"], ["c", "d"], ["e"]]


def test_one_shard_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict] = []

    def watched(shard: dict, file: Path) -> FileEntry:
        assert len(shard) == 2 and not any(seen), "an earlier shard is still held"
        seen.append(shard)
        return write_file(shard, file)

    monkeypatch.setattr(weights, "write_file", watched)
    write_weights({f"w{i}": lambda: torch.zeros(10) for i in range(8)}, tmp_path, max_shard_bytes=80)
    assert len(seen) == len(weight_files(tmp_path)) == 4


def test_a_missing_shard_is_reported(tmp_path: Path) -> None:
    write_weights(lazy(tensors()), tmp_path, max_shard_bytes=170)
    gone = weight_files(tmp_path)[2]
    gone.unlink()
    with pytest.raises(ModelError, match=gone.name):
        read_weights(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="no weights"):
        read_weights(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_a_damaged_file_is_reported(tmp_path: Path, damage: str) -> None:
    write_weights(lazy(tensors()), tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes({"cut": content[:-8], "empty": b"", "text": b"version https://git-lfs"}[damage])
    with pytest.raises(ModelError, match=r"model\.safetensors: damaged"):
        read_weights(tmp_path)


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert read_weights(tmp_path)["a"]().item() == 0.0


def test_pytorch_files_of_plain_tensors(tmp_path: Path) -> None:
    given = tensors()
    names = sorted(given)
    for number, part in enumerate((names[:4], names[4:]), 1):
        torch.save(
            {name: given[name] for name in part}, tmp_path / f"pytorch_model-{number:05d}-of-00002.bin"
        )
    assert_same(read_weights(tmp_path), given)


class Malice:
    """Writes a file when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("container", ["torch", "pickle"])
def test_pickle_with_code_is_rejected(tmp_path: Path, container: str) -> None:
    mark, file = tmp_path / "mark", tmp_path / "pytorch_model.bin"
    content = {"weight": torch.zeros(2), "extra": Malice(mark)}
    if container == "torch":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content))
    with pytest.raises(ModelError, match=r"pytorch_model\.bin"):
        read_weights(tmp_path)
    assert not mark.exists()
    torch.load(file, weights_only=False) if container == "torch" else pickle.loads(file.read_bytes())
    assert mark.exists(), "unrestricted loading must run the code"


def test_digest_depends_only_on_weights(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "same", "other", "renamed")]
    for folder in folders:
        folder.mkdir()
    write_weights(lazy(tensors()), folders[0])
    write_weights(lazy(tensors()), folders[1])
    (folders[1] / "config.json").write_text("{}")
    changed = tensors()
    changed["layers.3.weight"][2, 2] += 1e-6
    write_weights(lazy(changed), folders[2])
    renamed = {("other" if name == "ids" else name): t for name, t in tensors().items()}
    write_weights(lazy(renamed), folders[3])
    digests = [weights_digest(folder) for folder in folders]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    assert all(len(digest) == 64 for digest in digests)


def test_the_digest_covers_every_shard(tmp_path: Path) -> None:
    write_weights(lazy(tensors()), tmp_path, max_shard_bytes=170)
    before = weights_digest(tmp_path)
    for file in weight_files(tmp_path):
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert weights_digest(tmp_path) != before
        file.write_bytes(content)
    assert weights_digest(tmp_path) == before


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_file_permissions_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_file({"a": torch.zeros(1)}, tmp_path / "file.safetensors")
        assert os.umask(umask) == umask, "the umask must not change"
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file.safetensors").stat().st_mode) == mode


def test_a_file_is_laid_out_as_by_the_library(tmp_path: Path) -> None:
    given = tensors() | {"empty": torch.empty(0, 3), 'a "name" ü': torch.tensor(True)}
    dtypes = [torch.float64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint64, torch.uint32]
    dtypes += [torch.uint16, torch.float8_e4m3fn, torch.float8_e5m2]
    given |= {str(dtype): torch.arange(3).to(dtype) for dtype in dtypes}
    contiguous = {name: tensor.contiguous() for name, tensor in given.items()}
    save_file(contiguous, tmp_path / "own", metadata={"format": "pt"})
    entry = write_file(given, tmp_path / "ours")
    content = (tmp_path / "ours").read_bytes()
    assert content == (tmp_path / "own").read_bytes()
    assert entry == (len(content), hashlib.sha256(content).hexdigest())


def test_a_file_may_be_written_over_while_it_is_mapped(tmp_path: Path) -> None:
    file = tmp_path / "file.safetensors"
    write_file({"a": torch.arange(100_000)}, file)
    mapped = open_weights(file)["a"]()
    write_file({"a": torch.zeros(1)}, file)
    assert torch.equal(mapped, torch.arange(100_000))


@pytest.mark.parametrize("limit", [10**6, 170])
def test_each_file_is_hashed_while_it_is_written(tmp_path: Path, limit: int) -> None:
    entries = write_weights(lazy(tensors()), tmp_path, max_shard_bytes=limit)
    contents = {file.name: file.read_bytes() for file in weight_files(tmp_path)}
    assert entries == {name: (len(c), hashlib.sha256(c).hexdigest()) for name, c in contents.items()}


def test_file_metadata(tmp_path: Path) -> None:
    write_file({"a": torch.zeros(1)}, tmp_path / "file.safetensors")
    header = (tmp_path / "file.safetensors").read_bytes()
    length = int.from_bytes(header[:8], "little")
    assert json.loads(header[8 : 8 + length])["__metadata__"] == {"format": "pt"}
    assert open_weights(tmp_path / "file.safetensors").keys() == {"a"}


@pytest.mark.parametrize(("first", "second"), [(10**6, 80), (80, 10**6), (80, 170), (170, 80)])
def test_earlier_weight_files_are_deleted(tmp_path: Path, first: int, second: int) -> None:
    write_weights(lazy(tensors(seed=0)), tmp_path, max_shard_bytes=first)
    write_weights(lazy(tensors(seed=1)), tmp_path, max_shard_bytes=second)
    assert_same(read_weights(tmp_path), tensors(seed=1))
