"""A new model from a vision tower, a language model and perhaps a projector that were trained apart."""

import json
from pathlib import Path

import torch

from internvl_chat.model.configuration import InternVLChatConfig
from internvl_chat.model.io.checkpoint import empty_model
from internvl_chat.model.io.weights import Weights, assign_weights, open_weights, read_weights
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel
from internvl_chat.utils.errors import ModelError


def assembled_config(
    vision_folder: Path, llm_folder: Path, downsample_ratio: float, drop_path_rate: float = 0.0
) -> InternVLChatConfig:
    """Return the configuration of the model that `assemble_model` builds, without reading weights.

    Raises:
        ModelError: a part's configuration is missing or does not fit.
    """
    raw = {
        "model_type": "internvl_chat",
        "vision_config": {**_read_json(vision_folder / "config.json"), "drop_path_rate": drop_path_rate},
        "llm_config": _read_json(llm_folder / "config.json"),
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
    """Build the model; without a projector's file its weights are drawn at random.

    Args:
        vision_folder: InternViT with `config.json` and weights, named with or without `vision_model.`.
        llm_folder: a causal language model of transformers.
        mlp_file: projector weights, named with or without `mlp1.`.
        downsample_ratio: of the pixel shuffle.
        image_context_id: id of `<IMG_CONTEXT>`.
        dtype: of all weights.
        attn: an attention name of `resolve_attention`.
        drop_path_rate: stochastic depth of the vision tower.

    Raises:
        ModelError: a part is missing or does not fit.
    """
    config = assembled_config(vision_folder, llm_folder, downsample_ratio, drop_path_rate)
    model = empty_model(config, image_context_id, dtype, attn)
    assign_weights(
        model.vision_model, _without(read_weights(vision_folder), "vision_model."), source=vision_folder
    )
    assign_weights(model.language_model, read_weights(llm_folder), source=llm_folder)
    if mlp_file is None:
        for module in model.mlp1:
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    else:
        assign_weights(model.mlp1, _without(open_weights(mlp_file), "mlp1."), source=mlp_file)
    return model


def _without(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): read for name, read in weights.items()}


def _read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read: {error}") from None
