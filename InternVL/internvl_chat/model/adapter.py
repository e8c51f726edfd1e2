"""Adapters on disk: peft's format, with the path and the hash of the model that they belong to."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from internvl_chat.model.configuration import InternVLChatConfig
from internvl_chat.model.folders import is_adapter, model_folder, read_config, write_config
from internvl_chat.model.lora import (
    adapter_config,
    adapter_key,
    add_lora,
    lora_layers,
    parameter_name,
    ranks_of,
    read_adapter_config,
)
from internvl_chat.model.modeling import InternVLChatModel
from internvl_chat.model.weights import assign_weights, open_weights, weights_digest, write_file
from internvl_chat.utils.errors import ModelError
from internvl_chat.utils.hashed_file import FileEntry

ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE_FILE = "base_model.json"


@dataclass(frozen=True)
class BaseModel:
    """The model that adapters belong to: where it is, and the SHA-256 of its weight files."""

    path: str
    sha256: str


def read_base(folder: Path) -> BaseModel:
    """Read which base the adapters in a folder belong to.

    Raises:
        ModelError: the file that says so is missing or malformed.
    """
    file = folder / BASE_FILE
    try:
        return BaseModel(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{file}: does not name the adapter's base model: {error}") from None


def find_base(folder: Path, override: str | Path | None = None) -> tuple[Path, BaseModel]:
    """Return the verified folder of an adapter's base.

    Args:
        folder: the adapter's folder.
        override: where the base is now, if not where it was.

    Raises:
        ModelError: it is missing, or its weights are not those that the adapter was trained on.
    """
    base = read_base(folder)
    try:
        found = model_folder(override or base.path)
    except ModelError as error:
        raise ModelError(
            f"{folder}: the adapter's base is missing: {error}; give its folder with --base "
            "(in training --base_model_path)"
        ) from None
    if is_adapter(found):
        raise ModelError(f"{found}: is an adapter itself; the base must be a whole model")
    digest = weights_digest(found)
    if digest != base.sha256:
        raise ModelError(
            f"{found}: these weights (sha256 {digest[:12]}) are not the base that the adapter {folder} was "
            f"trained on (sha256 {base.sha256[:12]}); give the right folder with --base"
        )
    return found, BaseModel(str(override or base.path), digest)


def load_adapter(model: InternVLChatModel, folder: Path, *, dropout: float = 0.05) -> None:
    """Add the adapters of a folder to their base, and replace the modules that were trained whole."""
    llm_rank, vision_rank = ranks_of(read_adapter_config(folder))
    if not lora_layers(model):  # a base in the reference's wrapped format has them
        add_lora(model, llm_rank=llm_rank, vision_rank=vision_rank, dropout=dropout)
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
    model.replaced_modules = _modules_of(name for name in weights if ".lora_" not in name)


# Options that training may set after loading the base, and that decide what the model computes.
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


def adopt_options(config: InternVLChatConfig, of_adapter: InternVLChatConfig) -> None:
    """Set what an adapter was trained with in its base's configuration: options, size of the vocabulary."""
    for name in _OPTIONS:
        setattr(config, name, getattr(of_adapter, name))
    config.llm_config["vocab_size"] = of_adapter.llm_config["vocab_size"]


def _modules_of(names: Iterator[str]) -> set[str]:
    """Return the modules that own the named parameters, `mlp1` as one."""
    return {"mlp1" if name.startswith("mlp1.") else name.rpartition(".")[0] for name in names}


def _whole_modules(model: InternVLChatModel) -> set[str]:
    """Return the modules of a model with adapters that are trained, or were replaced, as a whole."""
    trained = (name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name)
    return _modules_of(trained) | model.replaced_modules


def adapter_weights(model: InternVLChatModel, names: Iterable[str]) -> set[str]:
    """Return those of the model's weights, by name, that `save_adapter` writes."""
    whole = tuple(f"{module}." for module in _whole_modules(model))
    return {name for name in names if ".lora_" in name or name.startswith(whole)}


def save_adapter(
    model: InternVLChatModel,
    folder: Path,
    base: BaseModel,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> dict[str, FileEntry]:
    """Write a model's adapters in peft's format, with every module that was trained whole beside them.

    Args:
        model: a model with adapters.
        folder: is made if need be.
        base: the model that they belong to.
        state_dict: the weights, where the model's own are spread over processes.

    Returns:
        The size and hash of the safetensors file, by name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state_dict = model.state_dict() if state_dict is None else state_dict
    names = adapter_weights(model, state_dict)
    kept = {adapter_key(name): tensor for name, tensor in state_dict.items() if name in names}
    entry = write_file(kept, folder / ADAPTER_WEIGHTS)
    modules = sorted(_whole_modules(model))
    adapter_config(model, base=base.path, modules_to_save=modules).save_pretrained(str(folder))
    (folder / BASE_FILE).write_text(json.dumps(asdict(base), indent=2) + "\n", encoding="utf-8")
    write_config(model.config, folder)
    return {ADAPTER_WEIGHTS: entry}
