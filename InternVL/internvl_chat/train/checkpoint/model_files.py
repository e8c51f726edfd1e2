"""Write the model files of a checkpoint: weights or adapters, tokenizer, and preprocessing settings."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.data.encode.tokenizer import load_tokenizer
from internvl_chat.data.encode.tokenizer_training import save_tokenizer
from internvl_chat.model.io.adapter import BaseModel, find_base, save_adapter
from internvl_chat.model.io.checkpoint import save_model
from internvl_chat.model.io.folders import is_adapter, read_auxiliary_files, write_files
from internvl_chat.model.io.weights import weights_digest
from internvl_chat.model.lora.injection import lora_layers
from internvl_chat.model.lora.quantization import NF4
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel
from internvl_chat.train.checks import RunPlan
from internvl_chat.train.setup import adapter_base
from internvl_chat.utils.hashed_file import FileEntry


def checkpoint_writer(
    plan: RunPlan, model: InternVLChatModel, tokenizer: PreTrainedTokenizerBase, preprocessing: Preprocessing
) -> Callable[[Path, dict[str, Tensor]], dict[str, FileEntry]]:
    """Return a function `write(folder, weights)`, which writes weights, tokenizer and preprocessing.

    `weights` are those of the full model or, if it has adapters, of the adapters alone. `write` returns the
    size and hash of each safetensors file, keyed by file name.

    For a model with adapters, creating the function takes a while, because rank 0 hashes the base model.
    """
    base = _base_model(plan) if lora_layers(model) and plan.config.run.is_main else None
    _, added = load_tokenizer(plan.source)
    # Read now, because the initial model may be a checkpoint that is deleted during the run.
    auxiliary = read_auxiliary_files(plan.source)

    def write(folder: Path, weights: dict[str, Tensor]) -> dict[str, FileEntry]:
        if base is not None:
            entries = save_adapter(model, folder, base, weights)
        else:
            entries = save_model(model, folder, weights)
        write_files(auxiliary, folder)
        if added:  # otherwise the auxiliary files include the tokenizer
            save_tokenizer(tokenizer, folder)
        preprocessing.save(folder)
        return entries

    return write


def _base_model(plan: RunPlan) -> BaseModel:
    """Return the description of the adapters' base model."""
    if is_adapter(plan.source):
        return find_base(plan.source, adapter_base(plan))[1]
    path = plan.config.model.model_name_or_path or str(plan.source)
    path = str(Path(path).absolute()) if Path(path).is_dir() else path
    return BaseModel(path, weights_digest(plan.source), NF4 if plan.config.model.load_in_4bit else None)
