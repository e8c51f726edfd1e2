"""Merging adapters into their base, tensor by tensor, so that memory does not grow with the model."""

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from internvl_chat.errors import ModelError
from internvl_chat.model.adapter import ADAPTER_WEIGHTS, adopt_options, find_base
from internvl_chat.model.checkpoint import model_weights, untie_distinct_head
from internvl_chat.model.folders import copy_companions, is_adapter, model_folder, read_config, write_config
from internvl_chat.model.lora import merged_weight, parameter_name, read_adapter_config
from internvl_chat.model.weights import Weights, open_weights, weights_digest, write_weights

_BASE_LAYER = re.compile(r"\.base_layer(?=\.(?:weight|bias)$)")
MERGE_FILE = "merged_from.json"


@dataclass(frozen=True)
class MergeResult:
    """What a merge did: the folder written, the layers merged, and whether there was anything to do."""

    folder: Path
    merged_layers: int
    already_merged: bool


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


def merge(source: str | Path, target: Path, *, base: str | Path | None = None) -> MergeResult:
    """Write a plain checkpoint in the reference's format from one with adapters.

    The source may be our adapters, the reference's LoRA-wrapped checkpoint, or a checkpoint without
    adapters, which is copied; merging the same source into the same target again does nothing.

    Args:
        source: folder or hub id.
        target: folder to write; must be new, empty, or the result of an earlier merge of `source`.
        base: for adapters, where their base is now.

    Raises:
        ModelError: the base does not match, or the target holds something else.
    """
    source, target = model_folder(source), Path(target)
    if target.exists() and not target.is_dir():
        raise ModelError(f"{target}: is a file; choose a folder")
    stamp = {"source_sha256": _source_digest(source)}
    if target.exists() and any(target.iterdir()):
        if source.resolve() == target.resolve() and not _has_adapters(source):
            return MergeResult(target, 0, already_merged=True)
        if _read_stamp(target) == stamp:
            return MergeResult(target, 0, already_merged=True)
        raise ModelError(f"{target}: exists and is not an earlier merge of {source}; choose another folder")
    if is_adapter(source):
        base_folder, _ = find_base(source, base)
        weights = _adapter_over_base(source, base_folder)
    else:
        base_folder, weights = source, model_weights(source)
    plain, layers = merged_weights(weights)
    config = read_config(base_folder)
    untie_distinct_head(config, plain)
    if is_adapter(source) and (source / "config.json").is_file():
        adopt_options(config, read_config(source))
    config.use_llm_lora = config.use_backbone_lora = 0
    staging = target.with_name(f".{target.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        write_weights(plain, staging)
        write_config(config, staging)
        copy_companions(base_folder, staging)
        copy_companions(source, staging)
        (staging / MERGE_FILE).write_text(json.dumps(stamp) + "\n", encoding="utf-8")
        if target.exists():
            target.rmdir()
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return MergeResult(target, layers, already_merged=False)


def _has_adapters(folder: Path) -> bool:
    return is_adapter(folder) or any(".lora_" in name for name in model_weights(folder))


def _source_digest(folder: Path) -> str:
    """Hash what is merged: the adapters, or the model's weights."""
    if is_adapter(folder):
        return hashlib.sha256((folder / ADAPTER_WEIGHTS).read_bytes()).hexdigest()
    return weights_digest(folder)


def _read_stamp(folder: Path) -> dict[str, str] | None:
    try:
        return json.loads((folder / MERGE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # not a merge of ours, and so nothing that may be written over
