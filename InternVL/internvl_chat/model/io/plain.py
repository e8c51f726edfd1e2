"""A checkpoint of any kind as a plain model in the reference's terms, read tensor by tensor.

Adapters are folded into the layers that they belong to; both formats are written from this one view.
"""

import copy
import re
from dataclasses import dataclass
from pathlib import Path

from internvl_chat.model.configuration import InternVLChatConfig
from internvl_chat.model.io.adapter import ADAPTER_WEIGHTS, adopt_options, find_base
from internvl_chat.model.io.checkpoint import model_weights, untie_distinct_head
from internvl_chat.model.io.folders import config_file, is_adapter, read_companions, read_config
from internvl_chat.model.io.weights import Weights, open_weights
from internvl_chat.model.lora.injection import merged_weight, parameter_name, read_adapter_config
from internvl_chat.utils.errors import ModelError

_BASE_LAYER = re.compile(r"\.base_layer(?=\.(?:weight|bias)$)")


@dataclass(frozen=True)
class PlainModel:
    """A model without adapters; its weights are read, and folded, when asked for.

    Attributes:
        config: in the reference's terms.
        config_text: what its `config.json` says, byte for byte where nothing had to be changed.
        weights: under the reference's names.
        companions: what else belongs to it, by name; those of adapters win over their base's.
        merged_layers: layers that adapters are folded into.
    """

    config: InternVLChatConfig
    config_text: str
    weights: Weights
    companions: dict[str, bytes]
    merged_layers: int


def open_plain(source: Path, *, base: str | Path | None = None) -> PlainModel:
    """Open a whole model, the reference's LoRA-wrapped checkpoint, or adapters over their base.

    Args:
        source: its folder.
        base: for adapters, where their base is now.

    Raises:
        ModelError: the base is missing or does not match.
    """
    if is_adapter(source):
        base_folder, _ = find_base(source, base)
        weights = _adapter_over_base(source, base_folder)
    else:
        base_folder, weights = source, model_weights(source)
    plain, layers = merged_weights(weights)
    config = read_config(base_folder)
    before = copy.deepcopy(config)
    untie_distinct_head(config, plain)
    if is_adapter(source) and (source / "config.json").is_file():
        adopt_options(config, read_config(source))
    config.use_llm_lora = config.use_backbone_lora = 0
    file = config_file(base_folder)
    unchanged = file is not None and config == before
    return PlainModel(
        config=config,
        config_text=file.read_text(encoding="utf-8") if unchanged else config.to_json_string(),
        weights=plain,
        companions=read_companions(base_folder) | read_companions(source),
        merged_layers=layers,
    )


def has_adapters(folder: Path) -> bool:
    """Say whether a folder holds adapters, by themselves or wrapped around their layers."""
    return is_adapter(folder) or any(".lora_" in name for name in model_weights(folder))


def merged_weights(weights: Weights) -> tuple[Weights, int]:
    """Fold every `lora_A`, `lora_B` into its `base_layer`; returns lazy weights and how many layers."""
    out: Weights = {}
    layers = 0
    for name, read in weights.items():
        if ".lora_" in name:
            continue
        layer = name.partition(".base_layer.")[0]
        adapter = [weights.get(f"{layer}.lora_{letter}.default.weight") for letter in "AB"]
        if name.endswith(".base_layer.weight") and all(adapter):
            layers += 1
            out[_BASE_LAYER.sub("", name)] = lambda r=read, ab=adapter: merged_weight(r(), ab[0](), ab[1]())
        else:
            out[_BASE_LAYER.sub("", name)] = read
    return out, layers


def _adapter_over_base(folder: Path, base_folder: Path) -> Weights:
    """Return the weights of base and adapter as one set of wrapped names."""
    read_adapter_config(folder)
    adapter = {parameter_name(key): read for key, read in open_weights(folder / ADAPTER_WEIGHTS).items()}
    layers = {name.partition(".lora_")[0] for name in adapter if ".lora_" in name}
    weights: Weights = {}
    for name, read in model_weights(base_folder).items():
        layer, _, kind = name.rpartition(".")
        weights[f"{layer}.base_layer.{kind}" if layer in layers else name] = read
    missing = {f"{layer}.base_layer.weight" for layer in layers} - weights.keys()
    if missing:
        raise ModelError(f"{folder}: the base {base_folder} lacks {len(missing)} of the adapted layers")
    return weights | adapter
