"""Model configurations for planning, without weights: of folders, files, hub ids and published models."""

from pathlib import Path

from internvl_chat.model.configuration import InternVLChatConfig
from internvl_chat.model.io.folders import read_config, read_json
from internvl_chat.model.published import PUBLISHED_MODELS, published_config
from internvl_chat.utils.errors import ModelError

# Files of a hub repository that describe the model and its tokenizer.
_DESCRIPTIONS = ["*.json", "*.txt", "*.model", "*.jinja"]
# Hub ids of the published models.
_HUB_IDS = {name: f"OpenGVLab/{name.replace('.', '_')}" for name in PUBLISHED_MODELS}
_NAMES = {hub_id: name for name, hub_id in _HUB_IDS.items()}


def find_model(name: str, *, needs_tokenizer: bool) -> tuple[InternVLChatConfig, Path | None]:
    """Return the configuration of a model and its folder (None if there is none); weights are never read.

    Args:
        name: model folder, `config.json`, hub id, or one of `PUBLISHED_MODELS`.
        needs_tokenizer: whether the folder must contain the tokenizer.

    Raises:
        ModelError: the model is not found, or its configuration is unusable.
    """
    path, published = Path(name).expanduser(), _NAMES.get(name, name)
    if path.is_dir():
        return read_config(path), path
    if path.is_file():
        if needs_tokenizer:
            raise ModelError(f"{name}: --meta requires the tokenizer; pass the model folder")
        return InternVLChatConfig.from_dict(read_json(path), source=name), None
    if published in PUBLISHED_MODELS and not needs_tokenizer:
        return InternVLChatConfig.from_dict(published_config(published), source=published), None
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ModelError(
            f"{name}: no such folder, file or model; known models: {', '.join(PUBLISHED_MODELS)}"
        )
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=_DESCRIPTIONS))
    except Exception as error:
        raise ModelError(
            f"{name}: neither a local folder nor available from the Hugging Face Hub ({error}); pass a "
            "folder with its config.json and tokenizer"
        ) from error
    return read_config(folder), folder


def launcher_path(name: str) -> str:
    """Return the `MODEL_PATH` of a model that `find_model` has found.

    >>> launcher_path("InternVL3.5-8B")
    'OpenGVLab/InternVL3_5-8B'
    """
    path = Path(name).expanduser()
    if path.is_file():
        return str(path.parent)
    return name if path.is_dir() else _HUB_IDS.get(name, name)
