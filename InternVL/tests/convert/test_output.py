"""Output folders of conversions are written atomically, never overwritten, and validated before reuse."""

import json
import os
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from model.conftest import (
    assert_plain,
    contents,
    save_trained_adapter,
    save_wrapped,
)

from internvl_chat.convert import merge as merging
from internvl_chat.convert.export import export_hf
from internvl_chat.convert.merge import merge
from internvl_chat.convert.output import ConversionOutput
from internvl_chat.utils.errors import ModelError, UsageError


@pytest.mark.parametrize("kind", ["adapter", "wrapped"])
def test_a_source_with_adapters_is_never_overwritten(folder: Path, tmp_path: Path, kind: str) -> None:
    source = tmp_path / kind
    if kind == "adapter":
        save_trained_adapter(folder, source)
    else:
        save_wrapped(source)
    before = contents(source)
    with pytest.raises(ModelError, match="choose a different folder"):
        merge(source, source)
    assert contents(source) == before


def test_target_with_other_content_is_rejected(folder: Path, tmp_path: Path) -> None:
    save_trained_adapter(folder, tmp_path / "adapter")
    target = tmp_path / "merged"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    with pytest.raises(ModelError, match="choose a different folder") as caught:
        merge(tmp_path / "adapter", target)
    assert str(target) in str(caught.value)
    assert contents(target) == {"thesis.txt": b"years of work"}


def test_target_of_another_source_is_rejected(folder: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        save_trained_adapter(folder, tmp_path / f"adapter-{seed}", seed=seed)
    merge(tmp_path / "adapter-1", tmp_path / "merged")
    before = contents(tmp_path / "merged")
    with pytest.raises(ModelError, match="was not created by this command"):
        merge(tmp_path / "adapter-2", tmp_path / "merged")
    assert contents(tmp_path / "merged") == before


@pytest.mark.parametrize("exists", [False, True])
def test_failure_leaves_no_files(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    save_trained_adapter(folder, tmp_path / "adapter")
    target = tmp_path / "out/merged"
    target.parent.mkdir()
    if exists:
        target.mkdir()

    def fail(weights, target: Path, **_) -> None:
        (target / "model-00001-of-00002.safetensors").write_bytes(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(merging, "write_weights", fail)
        with pytest.raises(OSError, match="no space left"):
            merge(tmp_path / "adapter", target)
    assert list(target.parent.rglob("*")) == ([target] if exists else [])
    assert merge(tmp_path / "adapter", target).merged_layers == 2 * 7


def test_target_that_cannot_be_created(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    target = tmp_path / "file/merged"
    with pytest.raises(
        ModelError, match=re.escape(f"{target}: the folder cannot be created: Not a directory")
    ):
        merge(folder, target)


@pytest.mark.parametrize("work", [merge, export_hf])
def test_target_inside_its_source_is_rejected(folder: Path, work: Callable) -> None:
    before = sorted(folder.rglob("*"))
    with pytest.raises(ModelError, match="is inside its source"):
        work(folder, folder / "sub/model")
    assert sorted(folder.rglob("*")) == before


def test_leftovers_of_a_killed_merge_are_removed(folder: Path, tmp_path: Path) -> None:
    save_trained_adapter(folder, tmp_path / "adapter")
    (tmp_path / "out/.merged.partial").mkdir(parents=True)
    (tmp_path / "out/.merged.partial/part-00001.safetensors").write_bytes(b"half")
    merge(tmp_path / "adapter", tmp_path / "out/merged")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["merged"]
    assert_plain(tmp_path / "out/merged")


def test_concurrent_merges_into_one_target(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge fails if another one is running, and does not overwrite a target written in the meantime."""
    source, target = tmp_path / "adapter", tmp_path / "merged"
    save_trained_adapter(folder, source)
    write = merging.write_weights

    def write_during_second_merge(*args, **kwargs) -> None:
        with pytest.raises(UsageError, match=rf"another run \(process {os.getpid()}\) is writing"):
            merge(source, target)
        return write(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(merging, "write_weights", write_during_second_merge)
        merge(source, target)
    assert_plain(target)
    before = contents(target)

    late = ConversionOutput(target, source, "merge")
    with pytest.raises(ModelError, match="written by another process"), late.write():
        pytest.fail("the target exists already")
    assert contents(target) == before
    assert not list(tmp_path.glob(".*"))


def test_full_disk_error_contains_the_file(folder: Path, tmp_path: Path) -> None:
    """A file size limit fails like a full disk: during a write, without the file name."""
    save_trained_adapter(folder, tmp_path / "adapter")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(ModelError) as caught:
            merge(tmp_path / "adapter", tmp_path / "out/merged")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    file = tmp_path / "out/.merged.partial/part-00001.safetensors"
    assert str(caught.value).startswith(
        f"{file}: File too large (the incomplete result was deleted); check the disk"
    )
    assert not list((tmp_path / "out").iterdir())


def test_failed_check_discards_the_merge(folder: Path, tmp_path: Path) -> None:
    save_trained_adapter(folder, tmp_path / "adapter")
    seen: list[Path] = []

    def fail(result: Path) -> None:
        assert_plain(result)
        seen.append(result)
        raise ModelError("differs")

    with pytest.raises(ModelError, match="differs"):
        merge(tmp_path / "adapter", tmp_path / "out/merged", check=fail)
    assert len(seen) == 1 and not list((tmp_path / "out").iterdir())
    merge(tmp_path / "adapter", tmp_path / "out/merged", check=seen.append)
    merge(tmp_path / "adapter", tmp_path / "out/merged", check=seen.append)
    assert len(seen) == 2, "an existing result is not checked again"


def test_existing_result_is_validated(folder: Path, tmp_path: Path) -> None:
    """Reuse fails if a file is missing, the source has changed, or the check was skipped."""
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(folder, source)
    merge(source, target)
    with pytest.raises(ModelError, match="was written without being compared with its source"):
        merge(source, target, check=lambda _: None)
    shutil.rmtree(target)
    merge(source, target, check=lambda _: None)
    assert merge(source, target).already_done
    weights = target / "model.safetensors"
    weights.rename(target / "elsewhere")
    with pytest.raises(ModelError, match=r"model\.safetensors is missing or has changed"):
        merge(source, target)
    (target / "elsewhere").rename(weights)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"max_dynamic_patch": 3}))
    with pytest.raises(ModelError, match="from the current source"):
        merge(source, target)
