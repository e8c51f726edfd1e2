"""Load checkpoints in any supported format and save them in the reference's format."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers.initialization import no_init_weights

from internvl_chat.model.configuration import InternVLChatConfig
from internvl_chat.model.io.adapter import find_base, load_adapter
from internvl_chat.model.io.experts import split_experts, stack_experts
from internvl_chat.model.io.folders import is_adapter, model_folder, read_config, write_config
from internvl_chat.model.io.hf_format import from_hf_weights
from internvl_chat.model.io.weights import Weights, assign_weights, read_weights, write_weights
from internvl_chat.model.lora.injection import add_lora, lora_layers, unwrapped_name
from internvl_chat.model.lora.quantization import quantize_decoder
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel
from internvl_chat.utils.errors import ModelError
from internvl_chat.utils.hashed_file import FileEntry

# Modules of InternVL3.5-Flash that select the number of tokens for each tile.
_RESOLUTION_ROUTER = ("pooling_before_gating.", "gating.", "mlp2.")


def model_weights(folder: Path) -> Weights:
    """Open the weights of a full model in any supported format, under the reference's parameter names.

    Raises:
        ModelError: a weight file is missing or damaged, or the model is an InternVL3.5-Flash.
    """
    weights = read_weights(folder)
    if any(name.removeprefix("model.").startswith(_RESOLUTION_ROUTER) for name in weights):
        raise ModelError(
            f"{folder}: InternVL3.5-Flash has a visual resolution router, which is not supported; use the "
            "model of the same size without Flash in its name"
        )
    if any(name.startswith(("model.vision_tower.", "vision_tower.")) for name in weights):
        return from_hf_weights(weights)
    return {unwrapped_name(name): read for name, read in weights.items()}


def untie_distinct_head(config: InternVLChatConfig, weights: Weights) -> None:
    """Set `tie_word_embeddings` to False if the embeddings and the head differ, as transformers does."""
    if config.llm_config.get("tie_word_embeddings"):
        names = ("lm_head", "model.embed_tokens")
        head, embeddings = (weights.get(f"language_model.{name}.weight") for name in names)
        if head and embeddings and not torch.equal(head(), embeddings()):
            config.llm_config["tie_word_embeddings"] = False


def load_model(
    path_or_id: str | Path,
    *,
    image_context_id: int,
    dtype: torch.dtype = torch.float32,
    attn: str = "sdpa",
    base: str | Path | None = None,
    lora_dropout: float = 0.05,
    drop_path_rate: float | None = None,
    load_in_4bit: bool = False,
) -> InternVLChatModel:
    """Load a model in any supported format on the CPU.

    If an adapter was trained on 4-bit weights, its base model is loaded in 4 bits.

    Args:
        path_or_id: folder or Hub id.
        image_context_id: id of `<IMG_CONTEXT>` in the tokenizer.
        dtype: dtype of all weights except adapters, which stay float32.
        attn: attention implementation, as returned by `resolve_attention`.
        base: new path or Hub id of an adapter's base model, if it has moved.
        lora_dropout: dropout probability of the adapters' input.
        drop_path_rate: stochastic depth rate of the vision tower (default: from the checkpoint).
        load_in_4bit: whether to quantize a model without adapters (see `model.lora.quantization`).

    Raises:
        UsageError: the model is to be loaded in 4 bits, but bitsandbytes is not installed.
        ModelError: the model or its base model is missing, or weights are missing, unexpected, of the wrong
            shape, or not finite.
    """
    folder = model_folder(path_or_id)
    base_folder = folder
    if is_adapter(folder):
        base_folder, description = find_base(folder, base)
        load_in_4bit = description.quantization is not None
    config = read_config(base_folder)
    if drop_path_rate is not None:
        config.vision_config.drop_path_rate = drop_path_rate
    weights = model_weights(base_folder)
    untie_distinct_head(config, weights)
    model = empty_model(config, image_context_id, dtype, attn)
    llm_rank, vision_rank = config.use_llm_lora, config.use_backbone_lora
    add_lora(model, llm_rank=llm_rank, vision_rank=vision_rank, dropout=lora_dropout)
    assign_weights(model, stack_experts(weights), source=base_folder)
    if load_in_4bit:
        quantize_decoder(model)
    if is_adapter(folder):
        load_adapter(model, folder, dropout=lora_dropout)
    return model


def empty_model(
    config: InternVLChatConfig, image_context_id: int, dtype: torch.dtype, attn: str
) -> InternVLChatModel:
    """Build a model with uninitialized weights."""
    with no_init_weights(), _default_dtype(dtype):
        model = InternVLChatModel(config, image_context_id, attn)
    model.language_model.tie_weights()  # normally part of the initialization
    return model


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def save_model(
    model: InternVLChatModel, folder: Path, state_dict: dict[str, torch.Tensor] | None = None
) -> dict[str, FileEntry]:
    """Write a full model in the reference's format: `config.json` and safetensors.

    Args:
        model: model without adapters.
        folder: folder to write; created if missing.
        state_dict: unsharded weights, if the model is sharded.

    Returns:
        Size and hash of each safetensors file, keyed by file name.
    """
    if lora_layers(model):
        raise ModelError("the model has adapters; save them with save_adapter or merge the checkpoint")
    folder.mkdir(parents=True, exist_ok=True)
    state_dict = model.state_dict() if state_dict is None else state_dict
    shared: set[int] = set()
    unique: dict[str, torch.Tensor] = {}
    for name, tensor in state_dict.items():
        if tensor.data_ptr() not in shared or tensor.numel() == 0:
            unique[name] = tensor.detach()
        shared.add(tensor.data_ptr())
    weights: Weights = {name: tensor.detach for name, tensor in split_experts(unique).items()}
    entries = write_weights(weights, folder)
    dtype = str(next(iter(state_dict.values())).dtype).removeprefix("torch.")
    model.config.raw["torch_dtype"] = model.config.llm_config["torch_dtype"] = dtype
    write_config(model.config, folder)
    return entries


def resize_vocabulary(model: InternVLChatModel, size: int, num_new: int) -> None:
    """Resize the vocabulary; each new row of the head is the mean of the old rows, as in the reference.

    Args:
        model: model to change in place.
        size: new vocabulary size.
        num_new: number of new rows, at the end.
    """
    llm = model.language_model
    llm.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        head = llm.get_output_embeddings().weight
        head[-num_new:] = head[:-num_new].mean(dim=0, keepdim=True)
    model.config.llm_config["vocab_size"] = size
    resized = (llm.get_input_embeddings(), llm.get_output_embeddings())
    model.replaced_modules |= {name for name, module in model.named_modules() if module in resized}
