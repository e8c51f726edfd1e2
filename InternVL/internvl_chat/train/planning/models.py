"""Model configurations for planning, without weights: of folders, files, hub ids and InternVL3 models."""

from pathlib import Path
from typing import Any, NamedTuple

from internvl_chat.model.configuration import InternVLChatConfig
from internvl_chat.model.io.folders import read_config, read_json
from internvl_chat.model.tiny import TinyShape, tiny_config
from internvl_chat.utils.errors import ModelError

_VOCABULARY = 151_674
# Files of a hub repository that describe the model and its tokenizer.
_DESCRIPTIONS = ["*.json", "*.txt", "*.model", "*.jinja"]


class _Decoder(NamedTuple):
    """Sizes of a Qwen2.5 language model."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp_width: int
    large_tower: bool = False


# Sizes of the published InternVL3 models with a Qwen2.5 language model, from their `config.json`.
_SIZES = {
    "InternVL3-1B": _Decoder(896, 24, 14, 2, 4864),
    "InternVL3-2B": _Decoder(1536, 28, 12, 2, 8960),
    "InternVL3-8B": _Decoder(3584, 28, 28, 4, 18_944),
    "InternVL3-14B": _Decoder(5120, 48, 40, 8, 13_824),
    "InternVL3-38B": _Decoder(5120, 64, 40, 8, 27_648, large_tower=True),
    "InternVL3-78B": _Decoder(8192, 80, 64, 8, 29_568, large_tower=True),
}
PUBLISHED_MODELS = tuple(_SIZES)
_HUB = "OpenGVLab/"
# Configuration values of InternViT-6B that differ from InternViT-300M.
_LARGE_TOWER: dict[str, Any] = {
    "hidden_size": 3200,
    "num_hidden_layers": 45,
    "num_attention_heads": 25,
    "intermediate_size": 12_800,
    "norm_type": "rms_norm",
    "qkv_bias": False,
    "qk_normalization": True,
}


def published_config(name: str) -> InternVLChatConfig:
    """Return the configuration of a published model, one of `PUBLISHED_MODELS`."""
    sizes = _SIZES[name]
    shape = TinyShape(
        image_size=448,
        vision_width=1024,
        vision_layers=24,
        vision_heads=16,
        width=sizes.width,
        layers=sizes.layers,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
    )
    raw = tiny_config(shape, _VOCABULARY).to_dict()
    raw["llm_config"]["intermediate_size"] = sizes.mlp_width
    if sizes.large_tower:
        raw["vision_config"] |= _LARGE_TOWER
    return InternVLChatConfig.from_dict(raw, source=name)


def find_model(name: str, *, needs_tokenizer: bool) -> tuple[InternVLChatConfig, Path | None]:
    """Return the configuration of a model and its folder (None if there is none); weights are never read.

    Args:
        name: model folder, `config.json`, hub id, or one of `PUBLISHED_MODELS`.
        needs_tokenizer: whether the folder must contain the tokenizer.

    Raises:
        ModelError: the model is not found, or its configuration is unusable.
    """
    path, short = Path(name).expanduser(), name.rsplit("/", 1)[-1]
    if path.is_dir():
        return read_config(path), path
    if path.is_file():
        if needs_tokenizer:
            raise ModelError(f"{name}: --meta requires the tokenizer; pass the model folder")
        return InternVLChatConfig.from_dict(read_json(path), source=name), None
    if short in _SIZES and not needs_tokenizer and name in (short, _HUB + short):
        return published_config(short), None
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ModelError(f"{name}: no such folder, file or model; known models: {', '.join(_SIZES)}")
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

    >>> launcher_path("InternVL3-8B")
    'OpenGVLab/InternVL3-8B'
    """
    path = Path(name).expanduser()
    if path.is_file():
        return str(path.parent)
    return _HUB + name if name in _SIZES and not path.is_dir() else name
