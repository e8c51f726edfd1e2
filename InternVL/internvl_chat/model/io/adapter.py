"""Read and write adapters in peft's format, together with the path and hash of their base model."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from internvl_chat.model.configuration import InternVLChatConfig
from internvl_chat.model.io.folders import is_adapter, model_folder, read_config, write_config
from internvl_chat.model.io.weights import assign_weights, open_weights, weights_digest, write_file
from internvl_chat.model.lora.injection import (
    adapter_config,
    adapter_key,
    add_lora,
    lora_layers,
    parameter_name,
    ranks_of,
    read_adapter_config,
)
from internvl_chat.model.lora.quantization import NF4
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel
from internvl_chat.utils.errors import ModelError
from internvl_chat.utils.files import write_json
from internvl_chat.utils.hashed_file import FileEntry

ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE_FILE = "base_model.json"


@dataclass(frozen=True)
class BaseModel:
    """Base model of an adapter.

    Attributes:
        path: path or Hub id.
        sha256: SHA-256 of its weights.
        quantization: `nf4` if the adapter was trained on 4-bit weights (see `model.lora.quantization`).
    """

    path: str
    sha256: str
    quantization: str | None = None


def read_base(folder: Path) -> BaseModel:
    """Read `base_model.json`, which describes an adapter's base model.

    Raises:
        ModelError: the file is missing or malformed.
    """
    file = folder / BASE_FILE
    try:
        base = BaseModel(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{file}: cannot read the adapter's base model: {error}") from None
    if base.quantization not in (None, NF4):
        raise ModelError(f"{file}: unknown quantization {base.quantization!r}; only {NF4!r} is supported")
    return base


def find_base(folder: Path, override: str | Path | None = None) -> tuple[Path, BaseModel]:
    """Locate an adapter's base model and verify its hash.

    Args:
        override: new path or Hub id of the base model, if it has moved.

    Returns:
        The base model's folder, and its description; the override replaces the path.

    Raises:
        ModelError: the base model is missing, is an adapter itself, or its hash differs from the hash in
            `base_model.json`.
    """
    base = read_base(folder)
    try:
        base_folder = model_folder(override or base.path)
    except ModelError as error:
        raise ModelError(
            f"{folder}: the adapter's base model is missing: {error}; pass its folder with --base "
            "(for training: --base_model_path)"
        ) from None
    if is_adapter(base_folder):
        raise ModelError(f"{base_folder}: is an adapter itself; the base must be a full model")
    digest = weights_digest(base_folder)
    if digest != base.sha256:
        raise ModelError(
            f"{base_folder}: these weights (sha256 {digest[:12]}) are not the base that {folder} was "
            f"trained on (sha256 {base.sha256[:12]}); pass the right folder with --base"
        )
    return base_folder, replace(base, path=str(override or base.path))


def load_adapter(model: InternVLChatModel, folder: Path, *, dropout: float = 0.05) -> None:
    """Add an adapter to its base model: LoRA weights, options, and the modules that it stores in full."""
    config = read_adapter_config(folder)
    llm_rank, vision_rank = ranks_of(config)
    if not lora_layers(model):  # a base model in the reference's LoRA-wrapped format already has LoRA layers
        add_lora(
            model,
            llm_rank=llm_rank,
            vision_rank=vision_rank,
            dropout=dropout,
            use_dora=config.use_dora,
            use_rslora=config.use_rslora,
        )
    weights = {parameter_name(key): read for key, read in open_weights(folder / ADAPTER_WEIGHTS).items()}
    expected = {name for name in model.state_dict() if ".lora_" in name}
    if expected - weights.keys():
        raise ModelError(f"{folder}: {len(expected - weights.keys())} adapter weights are missing")
    if (folder / "config.json").is_file():
        adopt_options(model.config, read_config(folder))
        size = int(model.config.llm_config["vocab_size"])
        if size != model.language_model.config.vocab_size:
            model.language_model.resize_token_embeddings(size, mean_resizing=False)
    assign_weights(model, weights, source=folder, partial=True)
    model.replaced_modules = _parent_modules(name for name in weights if ".lora_" not in name)


# Options that training can change and that affect the model's output.
_OPTIONS = (
    "ps_version",
    "select_layer",
    "template",
    "force_image_size",
    "dynamic_image_size",
    "use_thumbnail",
    "min_dynamic_patch",
    "max_dynamic_patch",
    "pad2square",
)


def adopt_options(config: InternVLChatConfig, adapter: InternVLChatConfig) -> None:
    """Copy an adapter's options and vocabulary size into the configuration of its base model."""
    for name in _OPTIONS:
        setattr(config, name, getattr(adapter, name))
    config.llm_config["vocab_size"] = adapter.llm_config["vocab_size"]


def _parent_modules(names: Iterable[str]) -> set[str]:
    """Return the names of the modules that contain these parameters; `mlp1` counts as one module."""
    return {"mlp1" if name.startswith("mlp1.") else name.rpartition(".")[0] for name in names}


def _modules_to_save(model: InternVLChatModel) -> set[str]:
    """Return the names of trained modules and of `replaced_modules`, which an adapter stores in full."""
    trained = (name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name)
    return _parent_modules(trained) | model.replaced_modules


def adapter_weights(model: InternVLChatModel, names: Iterable[str]) -> set[str]:
    """Return the names of the weights that `save_adapter` writes."""
    prefixes = tuple(f"{module}." for module in _modules_to_save(model))
    return {name for name in names if ".lora_" in name or name.startswith(prefixes)}


def save_adapter(
    model: InternVLChatModel,
    folder: Path,
    base: BaseModel,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> dict[str, FileEntry]:
    """Write a model's adapters and fully trained modules in peft's format, with its configuration.

    Args:
        folder: folder to write; created if missing.
        base: base model, recorded next to the adapter.
        state_dict: unsharded weights, if the model is sharded.

    Returns:
        Size and hash of the safetensors file, keyed by file name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state_dict = model.state_dict() if state_dict is None else state_dict
    names = adapter_weights(model, state_dict)
    tensors = {adapter_key(name): tensor for name, tensor in state_dict.items() if name in names}
    entry = write_file(tensors, folder / ADAPTER_WEIGHTS)
    modules = sorted(_modules_to_save(model))
    adapter_config(model, base=base.path, modules_to_save=modules).save_pretrained(str(folder))
    description = {name: value for name, value in asdict(base).items() if value is not None}
    write_json(folder / BASE_FILE, description)
    write_config(model.config, folder)
    return {ADAPTER_WEIGHTS: entry}
