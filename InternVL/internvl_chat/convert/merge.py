"""Merging adapters into their base, tensor by tensor, so that memory does not grow with the model."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from internvl_chat.model.io.card import carry_card
from internvl_chat.model.io.derived import check_target, is_made, making, stamp_of
from internvl_chat.model.io.folders import is_hf_format, model_folder, write_files
from internvl_chat.model.io.plain import has_adapters, open_plain
from internvl_chat.model.io.weights import SHARD_BYTES, write_weights


@dataclass(frozen=True)
class MergeResult:
    """What a merge did: the folder written, the layers merged, and whether there was anything to do."""

    folder: Path
    merged_layers: int
    already_merged: bool


def merge(
    source: str | Path,
    target: Path,
    *,
    base: str | Path | None = None,
    check: Callable[[Path], None] | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> MergeResult:
    """Write a plain checkpoint in the reference's format from one of any kind.

    The source may be our adapters, the reference's LoRA-wrapped checkpoint, transformers' format, or a
    checkpoint without adapters, which is copied; merging the same source into the same target again does
    nothing.

    Args:
        source: folder or hub id.
        target: folder to write; must be new, empty, or the result of an earlier merge of `source`.
        base: for adapters, where their base is now.
        check: is given the finished folder before it becomes the target; what it raises undoes the merge.
        max_shard_bytes: most bytes of a weight file, which are held in memory at a time.

    Raises:
        ModelError: the base does not match, or the target holds something else or is within the source.
    """
    source, target = model_folder(source), Path(target)
    if source.resolve() == target.resolve() and not has_adapters(source) and not is_hf_format(source):
        return MergeResult(target, 0, already_merged=True)
    check_target(target, source)
    stamp = stamp_of(source, "merge")
    if is_made(target, stamp, checked=check is not None):
        return MergeResult(target, 0, already_merged=True)
    model = open_plain(source, base=base)
    with making(target, stamp, checked=check is not None) as staging:
        write_weights(model.weights, staging, max_shard_bytes=max_shard_bytes)
        write_files(model.companions, staging)
        (staging / "config.json").write_text(model.config_text, encoding="utf-8")
        carry_card(source, staging, merged=model.merged_layers > 0)
        if check is not None:
            check(staging)
    return MergeResult(target, model.merged_layers, already_merged=False)
