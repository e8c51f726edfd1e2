"""Merge adapters into their base model, one tensor at a time to limit memory use."""

from collections.abc import Callable
from pathlib import Path

from internvl_chat.convert.model_card import carry_card
from internvl_chat.convert.output import Conversion, ConversionOutput
from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.model.io.folders import is_hf_format, model_folder, original_folder, write_files
from internvl_chat.model.io.merged_checkpoint import has_adapters, open_merged
from internvl_chat.model.io.weights import SHARD_BYTES, write_weights


def merge(
    source: str | Path,
    target: Path,
    *,
    base: str | Path | None = None,
    check: Callable[[Path], None] | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> Conversion:
    """Write a checkpoint as a full model in the reference's format, with adapters merged.

    Args:
        source: folder or Hub id, in any supported format.
        target: folder to write; must be new, empty, or the result of an earlier merge of `source`.
        base: new path or Hub id of an adapter's base model, if it has moved.
        check: called with the finished folder before it is moved into place; if it raises, the folder is
            deleted.
        max_shard_bytes: maximum bytes per weight file; one file at a time is in memory.

    Raises:
        ModelError: the base model does not match the adapter, or the target contains other files or is inside
            the source.
    """
    source, target = model_folder(source), Path(target)
    if source.resolve() == target.resolve() and not has_adapters(source) and not is_hf_format(source):
        return Conversion(target, already_done=True)
    output = ConversionOutput(target, source, "merge", check)
    if output.is_complete():
        return Conversion(target, already_done=True)
    model = open_merged(source, base=base)
    preprocessing = None
    if is_hf_format(source) and original_folder(source) is None:
        # The reference's format stores the tile limits in `config.json`, not in processor files.
        preprocessing = Preprocessing.from_folder(source, model.config)
        model = model.with_options(
            min_dynamic_patch=preprocessing.min_dynamic_patch,
            max_dynamic_patch=preprocessing.max_dynamic_patch,
            use_thumbnail=preprocessing.use_thumbnail,
        )
    with output.write() as folder:
        write_weights(model.weights, folder, max_shard_bytes=max_shard_bytes)
        write_files(model.auxiliary_files, folder)
        (folder / "config.json").write_text(model.config_text, encoding="utf-8")
        if preprocessing is not None:
            preprocessing.save(folder)
        carry_card(source, folder, merged=model.merged_layers > 0)
    return Conversion(target, model.merged_layers)
