"""Export of a checkpoint to transformers' own format, which loads there without our code."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from internvl_chat.constants import IM_END
from internvl_chat.data.encode.hf_processor import save_hf_processor
from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.data.encode.tokenizer import image_context_id, load_tokenizer
from internvl_chat.model.io.card import carry_card
from internvl_chat.model.io.derived import check_target, is_made, making, stamp_of
from internvl_chat.model.io.folders import ORIGINAL, model_folder, write_files
from internvl_chat.model.io.hf_format import to_hf_config, to_hf_weights
from internvl_chat.model.io.plain import PlainModel, open_plain
from internvl_chat.model.io.weights import SHARD_BYTES, write_weights
from internvl_chat.utils.errors import ModelError


@dataclass(frozen=True)
class ExportResult:
    """The folder written, and whether it was exported before."""

    folder: Path
    already_exported: bool


def export_hf(
    source: str | Path,
    target: Path,
    *,
    base: str | Path | None = None,
    check: Callable[[Path], None] | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> ExportResult:
    """Write a checkpoint of any kind as transformers' `InternVLForConditionalGeneration`.

    Writes model, processor, tokenizer, chat template and generation settings; adapters are merged. Files that
    transformers has no place for, such as the configuration in the reference's terms, are kept under
    `original`; from these `merge` writes the reference's format again, bit for bit.

    Args:
        source: folder or hub id.
        target: folder to write; must be new, empty, or the result of an earlier export of `source`.
        base: for adapters, where their base is now.
        check: called with the finished folder before it becomes the target; an exception undoes the export.
        max_shard_bytes: most bytes of a weight file, and of weights in memory at a time.

    Raises:
        ModelError: transformers has no such model or preprocessing, or the target holds something else or is
            within the source.
    """
    source, target = model_folder(source), Path(target)
    check_target(target, source)
    stamp = stamp_of(source, "export")
    if is_made(target, stamp, checked=check is not None):
        return ExportResult(target, already_exported=True)
    model = open_plain(source, base=base)
    tokenizer, added = load_tokenizer(source)
    if added:
        raise ModelError(f"{source}: the tokenizer lacks {added} of InternVL's special tokens")
    preprocessing = Preprocessing.from_folder(source, model.config)
    with making(target, stamp, checked=check is not None) as staging:
        config = _config(model, tokenizer)
        limit = int(config["text_config"].get("max_position_embeddings", preprocessing.max_seq_length))
        save_hf_processor(tokenizer, preprocessing, staging, limit)
        preprocessing.save(staging)
        _write_json(staging / "config.json", config)
        _write_json(staging / "generation_config.json", _generation_settings(model, tokenizer))
        _keep_original(model, staging / ORIGINAL)
        write_weights(to_hf_weights(model.weights), staging, max_shard_bytes=max_shard_bytes)
        carry_card(source, staging, merged=model.merged_layers > 0)
        if check is not None:
            check(staging)
    return ExportResult(target, already_exported=False)


def _config(model: PlainModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return transformers' `config.json`, with the dtype of the weights."""
    dtype = str(model.weights["language_model.model.embed_tokens.weight"]().dtype).removeprefix("torch.")
    config = to_hf_config(model.config, image_context_id(tokenizer)) | {"dtype": dtype}
    config["vision_config"]["dtype"] = config["text_config"]["dtype"] = dtype
    return config


def _generation_settings(model: PlainModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the checkpoint's generation settings, with the end of an answer in any case."""
    settings = json.loads(model.companions.get("generation_config.json", b"{}"))
    settings.pop("_from_model_config", None)
    end = tokenizer.convert_tokens_to_ids(IM_END)
    padding = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return settings | {"eos_token_id": end, "pad_token_id": padding}


def _keep_original(model: PlainModel, folder: Path) -> None:
    folder.mkdir()
    write_files(model.companions, folder)
    (folder / "config.json").write_text(model.config_text, encoding="utf-8")


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
