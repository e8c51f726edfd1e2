"""The levers of the preset `fast`, and how each is turned off alone."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from benchmarks.flags import Flags
from benchmarks.shapes import use_transformers_norms
from internvl_chat.model import attention
from internvl_chat.model.modeling import InternVLChatModel
from internvl_chat.train import trainer


@dataclass(frozen=True)
class Ablation:
    """How a lever is turned off.

    Attributes:
        flags: of the training command.
        undo: what is done to the model before the trainer is made.
        recipes: in which it is a lever.
        devices: on which it is one.
    """

    flags: Flags = field(default_factory=dict)
    undo: Callable[[InternVLChatModel], None] | None = None
    recipes: tuple[str, ...] = ("lora", "full")
    devices: tuple[str, ...] = ("cpu", "cuda")


def _plain_head(model: InternVLChatModel) -> None:
    """Logits at supervised positions by transformers, and cross-entropy in float32; the whole last layer."""
    model.language_model.get_output_embeddings().__class__ = nn.Linear


def _vision_by_pack(model: InternVLChatModel) -> None:
    model.always_run_vision = True


def _whole_attention(model: InternVLChatModel) -> None:
    """SDPA for each record and for all tiles."""
    attention._prefers_blocks = lambda query, dropout: False


def _new_memory(model: InternVLChatModel) -> None:
    trainer.keep_vocabulary_memory = lambda model: None


ABLATIONS = {
    "packing": Ablation({"packing": False}),
    "kept activations": Ablation({"grad_checkpoint": True}),
    "stochastic rounding": Ablation({"weight_precision": "bf16"}, recipes=("full",), devices=("cpu",)),
    "float32 masters": Ablation({"weight_precision": "bf16"}, recipes=("full",), devices=("cuda",)),
    "lean head and last layer": Ablation(undo=_plain_head),
    "lean norms": Ablation(undo=use_transformers_norms),
    "one pass over all tiles": Ablation(undo=_vision_by_pack),
    "attention in blocks": Ablation(undo=_whole_attention, devices=("cpu",)),
    "kept vocabulary memory": Ablation(undo=_new_memory, devices=("cpu",)),
}


def ablations(recipe: str, device: str) -> dict[str, Ablation]:
    """Return the levers of a recipe on a kind of device."""
    return {name: one for name, one in ABLATIONS.items() if recipe in one.recipes and device in one.devices}
