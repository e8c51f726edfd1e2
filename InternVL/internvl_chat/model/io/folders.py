"""Model folders: location, format, configuration and auxiliary files.

A folder contains a full model in the reference's format (plain or LoRA-wrapped) or in transformers' format,
or an adapter in peft's format.
"""

import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from internvl_chat.model.configuration import InternVLChatConfig
from internvl_chat.model.io.hf_format import HF_MODEL_TYPE, from_hf_config, to_hf_config
from internvl_chat.utils.errors import ModelError
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
# Subfolder of an export with the original configuration and auxiliary files.
ORIGINAL = "original"

# Files in the reference's format that determine the model's input and output.
_MODEL_FILES = (
    "*token*.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "chat_template.*",
    "generation_config.json",
    "*processor_config.json",
    "preprocessing.json",
    "*.py",
)
# Not copied: weights, configurations, metadata of a folder, and files written by runs and evaluations.
_NOT_AUXILIARY = (
    *("config.json", "adapter_config.json", "base_model.json", "*.index.json", "README.md", "made_from.json"),
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.npz"),
    *("metrics.jsonl", "ledger.jsonl", "validation.jsonl", "samples.jsonl", "sessions.jsonl"),
    *("config.yaml", "training_log.txt", "loss.png"),
    *("train_results.json", "trainer_state.json", "run_fingerprint.json", "manifest.json", "latest"),
    *("zero_to_fp32.py", "evaluation.json", "predictions*.jsonl", "metrics.json", "table.md", "bars.png"),
    *("radar.png", "report.html", "report.json", "judge.jsonl", "comparison.html", ".*"),
)
_MAX_AUXILIARY_BYTES = 100 * 10**6
_DOWNLOADED = (
    "*.json",
    "*.safetensors",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.py",
    "*.md",
    "LICENSE*",
    "NOTICE*",
)


def model_folder(path_or_id: str | Path) -> Path:
    """Return the folder of a model, downloading it if `organization/name` is a Hugging Face Hub id.

    Raises:
        ModelError: the folder does not exist, or the download failed.
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
            f"{path_or_id}: neither a local folder nor available from the Hugging Face Hub ({error}); "
            "download the model and pass its folder"
        ) from error


def is_adapter(folder: Path) -> bool:
    """Return whether a folder contains an adapter rather than a full model."""
    return (folder / ADAPTER_CONFIG).is_file()


def is_hf_format(folder: Path) -> bool:
    """Return whether a folder contains a model in transformers' format."""
    raw = read_json(folder / "config.json")
    return isinstance(raw, dict) and raw.get("model_type") == HF_MODEL_TYPE


def read_config(folder: Path) -> InternVLChatConfig:
    """Read the configuration of a model in any supported format.

    Raises:
        ModelError: the configuration is missing or malformed.
    """
    if not is_hf_format(folder):
        return InternVLChatConfig.from_folder(folder)
    original = original_folder(folder)
    return InternVLChatConfig.from_folder(original) if original else _read_hf_config(folder)


def config_file(folder: Path) -> Path | None:
    """Return the path to a folder's `config.json` in the reference's format.

    Returns None for a model in transformers' format whose `original` folder is missing or outdated.
    """
    parent = original_folder(folder) if is_hf_format(folder) else folder
    return parent / "config.json" if parent else None


def original_folder(folder: Path) -> Path | None:
    """Return the `original` subfolder of an export; None if it is missing or outdated.

    It is outdated if another program has changed the exported model's configuration.
    """
    original = folder / ORIGINAL
    if not (original / "config.json").is_file() or not is_hf_format(folder):
        return None
    if to_hf_config(InternVLChatConfig.from_folder(original), 0) == to_hf_config(_read_hf_config(folder), 0):
        return original
    logger.warning("%s: ignored, because %s describes a different model", original, folder / "config.json")
    return None


def _read_hf_config(folder: Path) -> InternVLChatConfig:
    file = folder / "config.json"
    try:
        return from_hf_config(read_json(file), source=str(file))
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file}: not a configuration of transformers' InternVL: {error!r}") from None


def read_json(file: Path) -> Any:
    """Read a JSON file; return None if it does not exist."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ModelError(f"{file}: not valid JSON: {error}") from None


def write_config(config: InternVLChatConfig, folder: Path) -> None:
    """Write a configuration to `config.json` in a folder."""
    (folder / "config.json").write_text(config.to_json_string(), encoding="utf-8")


def read_auxiliary_files(source: Path) -> dict[str, bytes]:
    """Return the contents of a checkpoint's auxiliary files, keyed by file name.

    These are all files except weights, configuration, and files written by runs and evaluations: the
    tokenizer, the preprocessing options, the reference's code, the license, and so on. Subfolders and files
    of more than 100 MB are skipped. For an export, the files are read from the subfolder `original`.
    """
    source = original_folder(source) or source
    files = {}
    for file in sorted(source.iterdir()):
        if not file.is_file() or any(fnmatchcase(file.name, pattern) for pattern in _NOT_AUXILIARY):
            continue
        if file.stat().st_size > _MAX_AUXILIARY_BYTES:
            logger.warning("%s: not copied, because it is larger than %d bytes", file, _MAX_AUXILIARY_BYTES)
            continue
        files[file.name] = file.read_bytes()
    return files


def is_model_file(name: str) -> bool:
    """Return whether an auxiliary file affects the model's input or output (unlike, say, a license)."""
    return any(fnmatchcase(name, pattern) for pattern in _MODEL_FILES)


def write_files(files: dict[str, bytes], folder: Path) -> None:
    """Write files, given as file name -> content, to a folder."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
