"""Writing the checkpoints of a run, each complete in itself."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from internvl_chat.data.preprocessing import Preprocessing
from internvl_chat.data.tokenizer import load_tokenizer
from internvl_chat.data.tokenizer_training import save_tokenizer
from internvl_chat.model.adapter import BaseModel, find_base, save_adapter
from internvl_chat.model.checkpoint import save_model
from internvl_chat.model.folders import is_adapter, read_companions
from internvl_chat.model.lora import lora_layers
from internvl_chat.model.modeling import InternVLChatModel
from internvl_chat.model.weights import weights_digest
from internvl_chat.train.checks import Plan
from internvl_chat.train.setup import base_of_adapters
from internvl_chat.utils.errors import UsageError


@dataclass(frozen=True)
class CheckpointWriter:
    """Writes self-contained checkpoints: the model or its adapters, tokenizer, preprocessing.

    Attributes:
        model: the model in training.
        tokenizer: saved anew where it was changed, else copied.
        preprocessing: of the run.
        companions: tokenizer and other files of the model that the run started from, in memory, because that
            may have been a checkpoint which does not outlive the next one.
        base: for adapters, the model that they belong to.
        keep_tokenizer: the tokenizer files among the companions are right as they are.
    """

    model: InternVLChatModel
    tokenizer: PreTrainedTokenizerBase
    preprocessing: Preprocessing
    companions: dict[str, bytes]
    base: BaseModel | None
    keep_tokenizer: bool

    def __call__(self, folder: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Write a checkpoint into a folder, which is made if need be.

        Raises:
            UsageError: the weights are spread over processes and were not gathered.
        """
        if state_dict is not None and not state_dict:
            raise UsageError(
                "DeepSpeed did not gather the weights, so that no model can be saved: set "
                '"stage3_gather_16bit_weights_on_model_save": true in the ZeRO-3 configuration'
            )
        if self.base is not None:
            save_adapter(self.model, folder, self.base, state_dict)
        else:
            save_model(self.model, folder, state_dict)
        for name, content in self.companions.items():
            (folder / name).write_bytes(content)
        if not self.keep_tokenizer:
            save_tokenizer(self.tokenizer, folder)
        self.preprocessing.save(folder)


def checkpoint_writer(
    plan: Plan, model: InternVLChatModel, tokenizer: PreTrainedTokenizerBase, preprocessing: Preprocessing
) -> CheckpointWriter:
    """Return what writes the run's checkpoints; hashes the base of adapters on the main process."""
    base = None
    if lora_layers(model) and plan.args.run.should_save:
        base = _base_of(plan)
    _, added = load_tokenizer(plan.source)
    companions = read_companions(plan.source)
    return CheckpointWriter(model, tokenizer, preprocessing, companions, base, keep_tokenizer=added == 0)


def _base_of(plan: Plan) -> BaseModel:
    """Return the whole model under the adapters of this run."""
    if is_adapter(plan.source):
        return find_base(plan.source, base_of_adapters(plan))[1]
    path = plan.args.model.model_name_or_path
    return BaseModel(str(Path(path).absolute()) if Path(path).is_dir() else path, weights_digest(plan.source))
