"""Write the model of a checkpoint: weights or adapters, tokenizer and preprocessing."""

from dataclasses import dataclass
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
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel
from internvl_chat.train.checks import RunPlan
from internvl_chat.train.setup import adapter_base
from internvl_chat.utils.hashed_file import FileEntry


@dataclass(frozen=True)
class CheckpointWriter:
    """Writes the model in training, or its adapters, into a folder.

    Attributes:
        auxiliary: tokenizer and other files of the initial model, by name. They are kept in memory, because
            the initial model may be a checkpoint that is deleted during the run.
        base: base model of the adapters; None without adapters.
        keep_tokenizer: keep the tokenizer files in `auxiliary`, because the tokenizer has not changed.
    """

    model: InternVLChatModel
    tokenizer: PreTrainedTokenizerBase
    preprocessing: Preprocessing
    auxiliary: dict[str, bytes]
    base: BaseModel | None
    keep_tokenizer: bool

    def __call__(self, folder: Path, weights: dict[str, Tensor]) -> dict[str, FileEntry]:
        """Write the model with the given weights; create the folder if needed.

        Returns:
            Size and hash of each safetensors file, by name.
        """
        if self.base is not None:
            entries = save_adapter(self.model, folder, self.base, weights)
        else:
            entries = save_model(self.model, folder, weights)
        write_files(self.auxiliary, folder)
        if not self.keep_tokenizer:
            save_tokenizer(self.tokenizer, folder)
        self.preprocessing.save(folder)
        return entries


def checkpoint_writer(
    plan: RunPlan, model: InternVLChatModel, tokenizer: PreTrainedTokenizerBase, preprocessing: Preprocessing
) -> CheckpointWriter:
    """Return the writer of the run's checkpoints; with adapters, hash their base model on rank 0."""
    base = _base_model(plan) if lora_layers(model) and plan.config.run.is_main else None
    _, added = load_tokenizer(plan.source)
    auxiliary = read_auxiliary_files(plan.source)
    return CheckpointWriter(model, tokenizer, preprocessing, auxiliary, base, keep_tokenizer=added == 0)


def _base_model(plan: RunPlan) -> BaseModel:
    """Return the base model of the run's adapters."""
    if is_adapter(plan.source):
        return find_base(plan.source, adapter_base(plan))[1]
    path = plan.config.model.model_name_or_path
    return BaseModel(str(Path(path).absolute()) if Path(path).is_dir() else path, weights_digest(plan.source))
