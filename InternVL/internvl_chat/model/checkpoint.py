"""Loading a model from a folder of any kind, and saving it in the reference's format."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers.initialization import no_init_weights

from internvl_chat.model.adapter import find_base, load_adapter
from internvl_chat.model.configuration import InternVLChatConfig
from internvl_chat.model.folders import is_adapter, model_folder, read_config, write_config
from internvl_chat.model.hf_format import from_hf_weights
from internvl_chat.model.lean import make_lean
from internvl_chat.model.lora import add_lora, lora_layers, unwrapped_name
from internvl_chat.model.modeling import InternVLChatModel
from internvl_chat.model.weights import Weights, assign_weights, read_weights, write_weights
from internvl_chat.utils.errors import ModelError
from internvl_chat.utils.hashed_file import FileEntry


def model_weights(folder: Path) -> Weights:
    """Open the weights of a whole model under our names, from any of its formats."""
    weights = read_weights(folder)
    if any(name.startswith(("model.vision_tower.", "vision_tower.")) for name in weights):
        return from_hf_weights(weights)
    return {unwrapped_name(name): read for name, read in weights.items()}


def untie_distinct_head(config: InternVLChatConfig, weights: Weights) -> None:
    """Believe two different matrices rather than a flag that ties them (as transformers does)."""
    if config.llm_config.get("tie_word_embeddings"):
        head, words = (weights.get(f"language_model.{n}.weight") for n in ("lm_head", "model.embed_tokens"))
        if head and words and not torch.equal(head(), words()):
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
) -> InternVLChatModel:
    """Load a model of any kind on the CPU, straight to `dtype` (adapters stay float32).

    Args:
        path_or_id: local folder or hub id.
        image_context_id: id of `<IMG_CONTEXT>` in the tokenizer.
        dtype: of all weights but adapters.
        attn: an attention name of `resolve_attention`.
        base: for adapters, where their base is now.
        lora_dropout: of the adapters, if there are any.
        drop_path_rate: stochastic depth of the vision tower; None for the checkpoint's.

    Raises:
        ModelError: names every missing, unexpected or misshapen weight.
    """
    folder = model_folder(path_or_id)
    if not is_adapter(folder):
        config = read_config(folder)
        if drop_path_rate is not None:
            config.vision_config.drop_path_rate = drop_path_rate
        weights = model_weights(folder)
        untie_distinct_head(config, weights)
        model = empty_model(config, image_context_id, dtype, attn)
        add_lora(
            model, llm_rank=config.use_llm_lora, vision_rank=config.use_backbone_lora, dropout=lora_dropout
        )
        assign_weights(model, weights, source=folder)
        return model
    base_folder, _ = find_base(folder, base)
    model = load_model(
        base_folder,
        image_context_id=image_context_id,
        dtype=dtype,
        attn=attn,
        lora_dropout=lora_dropout,
        drop_path_rate=drop_path_rate,
    )
    load_adapter(model, folder, dropout=lora_dropout)
    return model


def empty_model(
    config: InternVLChatConfig, image_context_id: int, dtype: torch.dtype, attn: str
) -> InternVLChatModel:
    """Build a model whose weights are allocated but never written (buffers are computed)."""
    with no_init_weights(), _default_dtype(dtype):
        model = InternVLChatModel(config, image_context_id, attn)
    model.language_model.tie_weights()  # part of the initialisation that was left out
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
    """Write a whole model in the reference's format: `config.json` and safetensors.

    Args:
        model: a model without adapters.
        folder: is made if need be.
        state_dict: the weights, where the model's own are spread over processes.

    Returns:
        The size and hash of each safetensors file, by name.
    """
    if lora_layers(model):
        raise ModelError("the model has adapters; save them with save_adapter, or merge the checkpoint")
    folder.mkdir(parents=True, exist_ok=True)
    state_dict = model.state_dict() if state_dict is None else state_dict
    shared: set[int] = set()
    weights: Weights = {}
    for name, tensor in state_dict.items():
        if tensor.data_ptr() not in shared or tensor.numel() == 0:
            weights[name] = lambda t=tensor: t
        shared.add(tensor.data_ptr())
    entries = write_weights(weights, folder)
    dtype = str(next(iter(state_dict.values())).dtype).removeprefix("torch.")
    model.config.raw["torch_dtype"] = model.config.llm_config["torch_dtype"] = dtype
    write_config(model.config, folder)
    return entries


def resize_vocabulary(model: InternVLChatModel, size: int, num_new: int) -> None:
    """Grow the language model's vocabulary; new rows of the head are the mean of the old (reference)."""
    llm = model.language_model
    llm.resize_token_embeddings(size, mean_resizing=False)
    make_lean(llm)
    with torch.no_grad():
        head = llm.get_output_embeddings().weight
        head[-num_new:] = head[:-num_new].mean(dim=0, keepdim=True)
    model.config.llm_config["vocab_size"] = size
    resized = (llm.get_input_embeddings(), llm.get_output_embeddings())
    model.replaced_modules |= {name for name, module in model.named_modules() if module in resized}
