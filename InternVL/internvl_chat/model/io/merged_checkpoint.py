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
from internvl_chat.model.lora.injection import (
    lora_scaling,
    merged_weight,
    parameter_name,
    read_adapter_config,
)
from internvl_chat.model.lora.quantization import dequantized, is_quantized_weight, require_bitsandbytes
from internvl_chat.utils.errors import ModelError

ReadTensor = Callable[[], torch.Tensor]

# Name parts of the adapter parameters of a layer; only DoRA has the last one.
_ADAPTER_PARTS = ("A", "B", "magnitude_vector")
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
        UsageError: the adapter was trained on 4-bit weights and bitsandbytes is not installed.
    """
    use_rslora = quantized = False
    if is_adapter(source):
        base_folder, description = find_base(source, base)
        lora, quantized = read_adapter_config(source), description.quantization is not None
        if quantized:
            require_bitsandbytes()
        weights, use_rslora = _with_adapter(source, base_folder, lora.use_dora), lora.use_rslora
    else:
        base_folder, weights = source, check_finite(model_weights(source), source)
    weights, merged_layers = _merge(weights, source, use_rslora=use_rslora, quantized=quantized)
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


def _merge(weights: Weights, source: Path, *, use_rslora: bool, quantized: bool) -> tuple[Weights, int]:
    """Merge each adapter into its `base_layer`; return the weights and the number of merges.

    Args:
        use_rslora: see `add_lora`.
        quantized: whether the adapters were trained on 4-bit weights. They are merged into the values of
            these weights, so that the result is the model that was trained.
    """
    merged: Weights = {}
    layers = 0
    for name, read in weights.items():
        if ".lora_" in name:
            continue
        layer = name.partition(".base_layer.")[0]
        plain_name = _BASE_LAYER.sub("", name)
        is_quantized = quantized and is_quantized_weight(plain_name)
        a, b, magnitude = (weights.get(f"{layer}.lora_{part}.default.weight") for part in _ADAPTER_PARTS)
        if not (a and b and name.endswith(".base_layer.weight")):
            a = b = magnitude = None
        layers += a is not None
        if a or is_quantized:
            read_merged = partial(_read_merged, read, a, b, magnitude, use_rslora, is_quantized)
            # The merged weight may overflow in 16 bits even if its inputs are finite.
            merged |= check_finite({plain_name: read_merged}, source)
        else:
            merged[plain_name] = read
    return merged, layers


def _with_adapter(folder: Path, base_folder: Path, use_dora: bool) -> Weights:
    """Return the combined weights of an adapter and its base model under LoRA-wrapped names."""
    adapter = {parameter_name(key): read for key, read in open_weights(folder / ADAPTER_WEIGHTS).items()}
    adapter = check_finite(adapter, folder)
    magnitudes = sum(name.endswith(".lora_magnitude_vector.default.weight") for name in adapter)
    layers = {name.partition(".lora_")[0] for name in adapter if ".lora_" in name}
    weights: Weights = {}
    for name, read in check_finite(model_weights(base_folder), base_folder).items():
        layer, _, kind = name.rpartition(".")
        weights[f"{layer}.base_layer.{kind}" if layer in layers else name] = read
    missing = {f"{layer}.base_layer.weight" for layer in layers} - weights.keys()
    if missing:
        raise ModelError(f"{folder}: the base model {base_folder} lacks {len(missing)} of the adapted layers")
    if use_dora and magnitudes < len(layers):
        raise ModelError(f"{folder}: the DoRA norms of {len(layers) - magnitudes} adapted layers are missing")
    return weights | adapter


def _read_merged(
    read: ReadTensor,
    read_a: ReadTensor | None,
    read_b: ReadTensor | None,
    read_magnitude: ReadTensor | None,
    use_rslora: bool,
    quantized: bool,
) -> torch.Tensor:
    """Read a base weight, round it to 4 bits if `quantized`, and merge the adapter into it, if any."""
    base = read()
    weight = dequantized(base) if quantized else base
    if read_a and read_b:
        a, magnitude = read_a(), read_magnitude() if read_magnitude else None
        weight = merged_weight(weight, a, read_b(), lora_scaling(len(a), use_rslora), magnitude)
    return weight.to(base.dtype)
