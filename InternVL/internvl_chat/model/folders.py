"""Model folders: where they are, what kind each is, its configuration, and what else belongs to it.

A folder holds a whole model (the reference's format, plain or wrapped in LoRA, or transformers') or
adapters in peft's format.
"""

import json
from pathlib import Path

from internvl_chat.errors import ModelError
from internvl_chat.model.configuration import InternVLChatConfig
from internvl_chat.model.hf_format import HF_MODEL_TYPE, from_hf_config

ADAPTER_CONFIG = "adapter_config.json"

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
_DOWNLOADED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py")


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


def read_config(folder: Path) -> InternVLChatConfig:
    """Read the configuration of a folder of any kind, of adapters with their ranks."""
    file = folder / "config.json"
    if file.is_file():
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(f"{file}: not valid JSON: {error}") from None
        if isinstance(raw, dict) and raw.get("model_type") == HF_MODEL_TYPE:
            try:
                return from_hf_config(raw, source=str(file))
            except (KeyError, TypeError, AttributeError) as error:
                raise ModelError(f"{file}: not transformers' InternVL: {error!r}") from None
    return InternVLChatConfig.from_folder(folder)


def write_config(config: InternVLChatConfig, folder: Path) -> None:
    """Write `config.json`."""
    (folder / "config.json").write_text(config.to_json_string(), encoding="utf-8")


def read_companions(source: Path) -> dict[str, bytes]:
    """Read what belongs to a checkpoint beside weights and configuration, by name."""
    files = {file for pattern in _COMPANIONS for file in source.glob(pattern)}
    return {file.name: file.read_bytes() for file in sorted(files) if file.name not in _NOT_COMPANIONS}


def copy_companions(source: Path, target: Path) -> None:
    """Copy what belongs to a checkpoint beside weights and configuration, byte for byte."""
    for name, content in read_companions(source).items():
        (target / name).write_bytes(content)
