"""Model folders: where they are, what kind each is, its configuration, and what else belongs to it.

A folder holds a whole model (the reference's format, plain or wrapped in LoRA, or transformers') or
adapters in peft's format.
"""

import json
from pathlib import Path
from typing import Any

from internvl_chat.model.configuration import InternVLChatConfig
from internvl_chat.model.io.hf_format import HF_MODEL_TYPE, from_hf_config, to_hf_config
from internvl_chat.utils.errors import ModelError
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
# In a folder of transformers' format that was exported: the small files as they were before.
ORIGINAL = "original"

# What else makes a folder a checkpoint: tokenizer, generation settings, the reference's code for others.
_COMPANIONS = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "preprocessing.json",
    "*.py",
)
_NOT_COMPANIONS = ("zero_to_fp32.py",)  # DeepSpeed leaves it in its checkpoints
_DOWNLOADED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py", "README.md")


def model_folder(path_or_id: str | Path) -> Path:
    """Return a local folder, downloading `organisation/name` from the Hugging Face hub.

    Raises:
        ModelError: there is no such folder and the hub cannot deliver it.
    """
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or str(path_or_id).count("/") != 1 or str(path_or_id).startswith((".", "/", "~")):
        raise ModelError(f"{path_or_id}: no such model folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path_or_id), allow_patterns=list(_DOWNLOADED)))
    except Exception as error:
        raise ModelError(
            f"{path_or_id}: neither a local folder nor available from the Hugging Face hub ({error}); "
            "download the model and give its folder"
        ) from error


def is_adapter(folder: Path) -> bool:
    """Say whether a folder holds adapters rather than a whole model."""
    return (folder / ADAPTER_CONFIG).is_file()


def is_hf_format(folder: Path) -> bool:
    """Say whether a folder holds a model in transformers' own format."""
    raw = _read_json(folder / "config.json")
    return isinstance(raw, dict) and raw.get("model_type") == HF_MODEL_TYPE


def read_config(folder: Path) -> InternVLChatConfig:
    """Read the configuration of a folder of any kind, of adapters with their ranks.

    Raises:
        ModelError: there is none, or it is malformed.
    """
    if not is_hf_format(folder):
        return InternVLChatConfig.from_folder(folder)
    original = original_folder(folder)
    return InternVLChatConfig.from_folder(original) if original else _read_hf_config(folder)


def config_file(folder: Path) -> Path | None:
    """Return the file that holds a folder's configuration in the reference's terms, if there is one."""
    place = original_folder(folder) if is_hf_format(folder) else folder
    return place / "config.json" if place else None


def original_folder(folder: Path) -> Path | None:
    """Return where an exported folder keeps the files that it had before, if they still describe its model.

    Configuration and tokenizer there are those of the exported model, unless it was changed since, as by
    training it further with other software.
    """
    original = folder / ORIGINAL
    if not (original / "config.json").is_file() or not is_hf_format(folder):
        return None
    kept, found = InternVLChatConfig.from_folder(original), _read_hf_config(folder)
    if to_hf_config(kept, 0) == to_hf_config(found, 0):
        return original
    logger.warning("%s: is not used, because %s is of another model", original, folder / "config.json")
    return None


def _read_hf_config(folder: Path) -> InternVLChatConfig:
    file = folder / "config.json"
    try:
        return from_hf_config(_read_json(file), source=str(file))
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file}: not transformers' InternVL: {error!r}") from None


def _read_json(file: Path) -> Any:
    """Read a JSON file; None where there is none."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ModelError(f"{file}: not valid JSON: {error}") from None


def write_config(config: InternVLChatConfig, folder: Path) -> None:
    """Write `config.json`."""
    (folder / "config.json").write_text(config.to_json_string(), encoding="utf-8")


def read_companions(source: Path) -> dict[str, bytes]:
    """Read what belongs to a checkpoint beside weights and configuration, by name."""
    source = original_folder(source) or source
    files = {file for pattern in _COMPANIONS for file in source.glob(pattern)}
    return {file.name: file.read_bytes() for file in sorted(files) if file.name not in _NOT_COMPANIONS}


def copy_companions(source: Path, target: Path) -> None:
    """Copy what belongs to a checkpoint beside weights and configuration, byte for byte."""
    write_files(read_companions(source), target)


def write_files(files: dict[str, bytes], folder: Path) -> None:
    """Write files into a folder, by name."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
