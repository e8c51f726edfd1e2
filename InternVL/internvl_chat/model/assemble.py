"""Assemble a new model from a vision tower, a language model and an optional projector."""

from pathlib import Path

import torch
from torch import nn

from internvl_chat.model.configuration import InternVLChatConfig
from internvl_chat.model.io.checkpoint import empty_model
from internvl_chat.model.io.experts import stack_experts
from internvl_chat.model.io.folders import read_json
from internvl_chat.model.io.weights import Weights, assign_weights, open_weights, read_weights
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel
from internvl_chat.utils.errors import ModelError


def assembled_config(
    vision_folder: Path, llm_folder: Path, downsample_ratio: float, drop_path_rate: float = 0.0
) -> InternVLChatConfig:
    """Return the configuration of the model that `assemble_model` builds, without reading weights.

    Raises:
        ModelError: a part's configuration is missing or invalid.
    """
    raw = {
        "model_type": "internvl_chat",
        "vision_config": {**_read_config(vision_folder), "drop_path_rate": drop_path_rate},
        "llm_config": _read_config(llm_folder),
        "downsample_ratio": downsample_ratio,
        "ps_version": "v2",
    }
    return InternVLChatConfig.from_dict(raw, source=f"{vision_folder} with {llm_folder}")


def assemble_model(
    *,
    vision_folder: Path,
    llm_folder: Path,
    mlp_file: Path | None,
    downsample_ratio: float,
    image_context_id: int,
    dtype: torch.dtype,
    attn: str,
    drop_path_rate: float = 0.0,
) -> InternVLChatModel:
    """Return a model that is assembled from its parts.

    Args:
        vision_folder: InternViT with `config.json` and weights; the prefix `vision_model.` is optional.
        llm_folder: causal language model in transformers' format.
        mlp_file: projector weights (the prefix `mlp1.` is optional); None for random initialization.
        downsample_ratio: ratio of the pixel shuffle, for example 0.5.
        image_context_id: id of `<IMG_CONTEXT>` in the tokenizer.
        dtype: dtype of all weights.
        attn: attention implementation, as returned by `resolve_attention`.
        drop_path_rate: stochastic depth rate of the vision tower.

    Raises:
        ModelError: a part is missing, or its weights do not match its configuration.
    """
    config = assembled_config(vision_folder, llm_folder, downsample_ratio, drop_path_rate)
    model = empty_model(config, image_context_id, dtype, attn)
    vision_weights = _without_prefix(read_weights(vision_folder), "vision_model.")
    assign_weights(model.vision_model, vision_weights, source=vision_folder)
    assign_weights(model.language_model, stack_experts(read_weights(llm_folder)), source=llm_folder)
    if mlp_file is None:
        for module in model.mlp1:
            if isinstance(module, nn.Linear | nn.LayerNorm):
                module.reset_parameters()
    else:
        assign_weights(model.mlp1, _without_prefix(open_weights(mlp_file), "mlp1."), source=mlp_file)
    return model


def _without_prefix(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): read for name, read in weights.items()}


def _read_config(folder: Path) -> dict:
    config = read_json(folder / "config.json")
    if config is None:
        raise ModelError(f"{folder}: no config.json; is this a model folder?")
    return config
