"""Ablations of the `fast` preset, each of which switches one optimization on or off."""

from collections.abc import Callable
from dataclasses import dataclass, field

from transformers.utils import is_liger_kernel_available

from benchmarks.presets.recipes import Flags
from internvl_chat.model import attention
from internvl_chat.model.kernels import apply
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel


@dataclass(frozen=True)
class Ablation:
    """Changes that switch one optimization on or off.

    Attributes:
        flags: flags for the training script.
        patch: function that is called with the model before training is set up.
        recipes: recipes in which the optimization can be used.
        devices: devices on which it can be used.
        dtypes: dtypes with which it can be used.
    """

    flags: Flags = field(default_factory=dict)
    patch: Callable[[InternVLChatModel], None] | None = None
    recipes: tuple[str, ...] = ("lora", "full")
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = ("bfloat16", "float32")


def _plain_head(model: InternVLChatModel) -> None:
    """Run the last layer and the head at all positions, as transformers does, with float32 cross-entropy."""
    apply.supervise_positions = lambda model: None


def _transformers_norms(model: InternVLChatModel) -> None:
    apply.fuse_norms = lambda module: None


def _vision_per_pack(model: InternVLChatModel) -> None:
    model.always_run_vision = True


def _unblocked_attention(model: InternVLChatModel) -> None:
    """Call SDPA once per record, and once for all tiles together."""
    attention._prefers_blocks = lambda query, dropout: False


def _new_buffers(model: InternVLChatModel) -> None:
    apply.use_persistent_buffers = lambda llm: None


LIGER = "with Liger"

# In the table, each key is preceded by "fast".
ABLATIONS = {
    "without packing": Ablation({"packing": False}),
    "with activation checkpointing": Ablation({"grad_checkpoint": True}),
    "without stochastic rounding": Ablation(
        {"weight_precision": "bf16"}, recipes=("full",), devices=("cpu",), dtypes=("bfloat16",)
    ),
    "without float32 masters": Ablation(
        {"weight_precision": "bf16"}, recipes=("full",), devices=("cuda",), dtypes=("bfloat16",)
    ),
    "without supervised-only head": Ablation(patch=_plain_head),
    "without fused norms": Ablation(patch=_transformers_norms, devices=("cuda",)),
    "without one vision pass per step": Ablation(patch=_vision_per_pack),
    "without blocked attention": Ablation(patch=_unblocked_attention, devices=("cpu",), dtypes=("bfloat16",)),
    "without persistent buffers": Ablation(patch=_new_buffers, devices=("cpu",)),
    "with torch.compile": Ablation({"torch_compile": True}, devices=("cuda",)),
    LIGER: Ablation({"use_liger": True}, devices=("cuda",)),
}


def ablations(recipe: str, device: str, dtype: str) -> dict[str, Ablation]:
    """Return the ablations that apply to a recipe, a device and a dtype, if their packages are installed."""
    return {
        name: ablation
        for name, ablation in ABLATIONS.items()
        if recipe in ablation.recipes
        and device in ablation.devices
        and dtype in ablation.dtypes
        and (name != LIGER or is_liger_kernel_available())
    }
