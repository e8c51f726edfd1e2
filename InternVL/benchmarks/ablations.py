"""The levers of the preset `fast`, and how each is pulled the other way alone."""

from collections.abc import Callable
from dataclasses import dataclass, field

from transformers.utils import is_liger_kernel_available

from benchmarks.flags import Flags
from internvl_chat.model import attention
from internvl_chat.model.kernels import apply
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel


@dataclass(frozen=True)
class Ablation:
    """How one lever is pulled the other way: most are on in `fast` and turned off.

    Attributes:
        flags: of the training command.
        undo: what is done to the model before training is set up.
        recipes: in which it is a lever.
        devices: on which it is one.
        dtypes: in which it is one.
    """

    flags: Flags = field(default_factory=dict)
    undo: Callable[[InternVLChatModel], None] | None = None
    recipes: tuple[str, ...] = ("lora", "full")
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = ("bfloat16", "float32")


def _plain_head(model: InternVLChatModel) -> None:
    """Logits at labeled positions by transformers, and cross-entropy in float32; the whole last layer."""
    apply.supervise_positions = lambda model: None


def _transformers_norms(model: InternVLChatModel) -> None:
    apply.fuse_norms = lambda module: None


def _vision_by_pack(model: InternVLChatModel) -> None:
    model.always_run_vision = True


def _whole_attention(model: InternVLChatModel) -> None:
    """SDPA for each record and for all tiles."""
    attention._prefers_blocks = lambda query, dropout: False


def _new_buffers(model: InternVLChatModel) -> None:
    apply.use_persistent_buffers = lambda llm: None


LIGER = "with Liger"

# What a table calls them, behind "fast".
ABLATIONS = {
    "without packing": Ablation({"packing": False}),
    "without kept activations": Ablation({"grad_checkpoint": True}),
    "without stochastic rounding": Ablation(
        {"weight_precision": "bf16"}, recipes=("full",), devices=("cpu",), dtypes=("bfloat16",)
    ),
    "without float32 masters": Ablation(
        {"weight_precision": "bf16"}, recipes=("full",), devices=("cuda",), dtypes=("bfloat16",)
    ),
    "without supervised head and last layer": Ablation(undo=_plain_head),
    "without fused norms": Ablation(undo=_transformers_norms, devices=("cuda",)),
    "without one pass over all tiles": Ablation(undo=_vision_by_pack),
    "without attention in blocks": Ablation(undo=_whole_attention, devices=("cpu",), dtypes=("bfloat16",)),
    "without persistent buffers": Ablation(undo=_new_buffers, devices=("cpu",)),
    "with torch.compile": Ablation({"torch_compile": True}, devices=("cuda",)),
    LIGER: Ablation({"use_liger": True}, devices=("cuda",)),
}


def ablations(recipe: str, device: str, dtype: str) -> dict[str, Ablation]:
    """Return the levers of a recipe on a device in a dtype, as far as their packages are installed."""
    return {
        name: one
        for name, one in ABLATIONS.items()
        if recipe in one.recipes
        and device in one.devices
        and dtype in one.dtypes
        and (name != LIGER or is_liger_kernel_available())
    }
