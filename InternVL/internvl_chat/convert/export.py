"""Export a checkpoint to transformers' own format, which transformers loads without remote code."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from internvl_chat.constants import IM_END
from internvl_chat.convert.model_card import carry_card
from internvl_chat.convert.output import Conversion, ConversionOutput
from internvl_chat.data.encode.hf_processor import save_hf_processor
from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.data.encode.tokenizer import image_context_id, load_tokenizer
from internvl_chat.model.io.folders import ORIGINAL, is_model_file, model_folder, write_files
from internvl_chat.model.io.hf_format import to_hf_config, to_hf_weights
from internvl_chat.model.io.merged_checkpoint import MergedCheckpoint, open_merged
from internvl_chat.model.io.weights import SHARD_BYTES, write_weights
from internvl_chat.utils.errors import ModelError
from internvl_chat.utils.files import write_json


def export_hf(
    source: str | Path,
    target: Path,
    *,
    base: str | Path | None = None,
    check: Callable[[Path], None] | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> Conversion:
    """Export a checkpoint as transformers' `InternVLForConditionalGeneration`, with adapters merged.

    The subfolder `original` keeps the original configuration and auxiliary files, so that `merge` can restore
    the reference's format bit for bit.

    Args:
        source: folder or Hub id, in any supported format.
        target: folder to write; must be new, empty, or the result of an earlier export of `source`.
        base: new path or Hub id of an adapter's base model, if it has moved.
        check: called with the finished folder before it is moved into place; if it raises, the folder is
            deleted.
        max_shard_bytes: maximum bytes per weight file; one file at a time is in memory.

    Raises:
        ModelError: transformers does not support the model or its preprocessing, or the target contains other
            files or is inside the source.
    """
    source, target = model_folder(source), Path(target)
    output = ConversionOutput(target, source, "export", check)
    if output.is_complete():
        return Conversion(target, already_done=True)
    model = open_merged(source, base=base)
    tokenizer, added = load_tokenizer(source)
    if added:
        raise ModelError(f"{source}: the tokenizer lacks {added} of InternVL's special tokens")
    preprocessing = Preprocessing.from_folder(source, model.config)
    with output.write() as folder:
        config = _config(model, tokenizer)
        limit = int(config["text_config"].get("max_position_embeddings", preprocessing.max_seq_length))
        save_hf_processor(tokenizer, preprocessing, folder, limit)
        preprocessing.save(folder)
        write_json(folder / "config.json", config)
        write_json(folder / "generation_config.json", _generation_config(model, tokenizer))
        original = folder / ORIGINAL
        original.mkdir()
        write_files(model.auxiliary_files, original)
        # Licenses and other documentation go into both folders.
        other = {name: content for name, content in model.auxiliary_files.items() if not is_model_file(name)}
        write_files(other, folder)
        (original / "config.json").write_text(model.config_text, encoding="utf-8")
        write_weights(to_hf_weights(model.weights), folder, max_shard_bytes=max_shard_bytes)
        carry_card(source, folder, merged=model.merged_layers > 0)
    return Conversion(target, model.merged_layers)


def _config(model: MergedCheckpoint, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the content of transformers' `config.json`, including the dtype of the weights."""
    dtype = str(model.weights["language_model.model.embed_tokens.weight"]().dtype).removeprefix("torch.")
    config = to_hf_config(model.config, image_context_id(tokenizer)) | {"dtype": dtype}
    config["vision_config"]["dtype"] = config["text_config"]["dtype"] = dtype
    return config


def _generation_config(model: MergedCheckpoint, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the checkpoint's generation configuration with `<|im_end|>` as the end-of-sequence token."""
    config = json.loads(model.auxiliary_files.get("generation_config.json", b"{}"))
    config.pop("_from_model_config", None)
    end = tokenizer.convert_tokens_to_ids(IM_END)
    padding = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return config | {"eos_token_id": end, "pad_token_id": padding}
