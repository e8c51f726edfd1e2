"""Lazily read any supported checkpoint as a full model in the reference's format, with adapters merged."""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from internvl_chat.model.configuration import InternVLChatConfig
from internvl_chat.model.io.adapter import ADAPTER_WEIGHTS, adopt_options, find_base
from internvl_chat.model.io.checkpoint import model_weights, untie_distinct_head
from internvl_chat.model.io.folders import config_file, is_adapter, read_auxiliary_files, read_config
from internvl_chat.model.io.weights import Weights, check_finite, open_weights
from internvl_chat.model.lora.injection import merged_weight, parameter_name, read_adapter_config
from internvl_chat.utils.errors import ModelError

_BASE_LAYER = re.compile(r"\.base_layer(?=\.(?:weight|bias)$)")


@dataclass(frozen=True)
class MergedCheckpoint:
    """Full model whose weights are read and merged on demand.

    Attributes:
        config: configuration in the reference's format.
        config_text: content of its `config.json`; identical to the original file if no option changed.
        weights: weights under the reference's parameter names.
        auxiliary_files: contents of other files, keyed by file name; an adapter's files replace files of its
            base model with the same name.
        merged_layers: number of layers into which adapters are merged.
    """

    config: InternVLChatConfig
    config_text: str
    weights: Weights
    auxiliary_files: dict[str, bytes]
    merged_layers: int

    def with_options(self, **options: int | bool) -> "MergedCheckpoint":
        """Return a copy in which some configuration fields are replaced."""
        config = copy.deepcopy(self.config)
        for name, value in options.items():
            setattr(config, name, value)
        text = self.config_text if config == self.config else config.to_json_string()
        return replace(self, config=config, config_text=text)


def open_merged(source: Path, *, base: str | Path | None = None) -> MergedCheckpoint:
    """Open a full model, a LoRA-wrapped checkpoint of the reference, or an adapter with its base model.

    Args:
        source: folder of the checkpoint.
        base: new path or Hub id of an adapter's base model, if it has moved.

    Raises:
        ModelError: the base model is missing or does not match, or a weight is not finite (raised when the
            weight is read).
    """
    if is_adapter(source):
        base_folder, _ = find_base(source, base)
        weights = _with_adapter(source, base_folder)
    else:
        base_folder, weights = source, check_finite(model_weights(source), source)
    weights, merged_layers = _merge(weights, source)
    config = read_config(base_folder)
    before = copy.deepcopy(config)
    untie_distinct_head(config, weights)
    if is_adapter(source) and (source / "config.json").is_file():
        adopt_options(config, read_config(source))
    config.use_llm_lora = config.use_backbone_lora = 0
    file = config_file(base_folder)
    unchanged = file if config == before else None
    return MergedCheckpoint(
        config=config,
        config_text=unchanged.read_text(encoding="utf-8") if unchanged else config.to_json_string(),
        weights=weights,
        auxiliary_files=read_auxiliary_files(base_folder) | read_auxiliary_files(source),
        merged_layers=merged_layers,
    )


def has_adapters(folder: Path) -> bool:
    """Return whether a folder contains an adapter or a LoRA-wrapped checkpoint."""
    return is_adapter(folder) or any(".lora_" in name for name in model_weights(folder))


def _merge(weights: Weights, source: Path) -> tuple[Weights, int]:
    """Merge each `lora_A` and `lora_B` into its `base_layer`; return the weights and the number of merges."""
    merged: Weights = {}
    layers = 0
    for name, read in weights.items():
        if ".lora_" in name:
            continue
        layer = name.partition(".base_layer.")[0]
        a, b = (weights.get(f"{layer}.lora_{letter}.default.weight") for letter in "AB")
        plain_name = _BASE_LAYER.sub("", name)
        if a and b and name.endswith(".base_layer.weight"):
            layers += 1
            # The merged weight may overflow in 16 bits even if its inputs are finite.
            merged |= check_finite({plain_name: partial(_read_merged, read, a, b)}, source)
        else:
            merged[plain_name] = read
    return merged, layers


def _with_adapter(folder: Path, base_folder: Path) -> Weights:
    """Return the combined weights of an adapter and its base model under LoRA-wrapped names."""
    read_adapter_config(folder)
    adapter = {parameter_name(key): read for key, read in open_weights(folder / ADAPTER_WEIGHTS).items()}
    adapter = check_finite(adapter, folder)
    layers = {name.partition(".lora_")[0] for name in adapter if ".lora_" in name}
    weights: Weights = {}
    for name, read in check_finite(model_weights(base_folder), base_folder).items():
        layer, _, kind = name.rpartition(".")
        weights[f"{layer}.base_layer.{kind}" if layer in layers else name] = read
    missing = {f"{layer}.base_layer.weight" for layer in layers} - weights.keys()
    if missing:
        raise ModelError(f"{folder}: the base model {base_folder} lacks {len(missing)} of the adapted layers")
    return weights | adapter


def _read_merged(
    weight: Callable[[], torch.Tensor], a: Callable[[], torch.Tensor], b: Callable[[], torch.Tensor]
) -> torch.Tensor:
    return merged_weight(weight(), a(), b())
