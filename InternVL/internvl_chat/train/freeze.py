"""Choose the trainable parameters and count them by module."""

from typing import NamedTuple

from torch import nn

from internvl_chat.model.lora.quantization import parameter_count
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel


class ModuleRow(NamedTuple):
    """Row of the parameter table, which is logged at the start of a run."""

    module: str
    parameters: int
    trainable: int


def set_trainable(
    model: InternVLChatModel,
    *,
    freeze_llm: bool = False,
    freeze_mlp: bool = False,
    freeze_backbone: bool = False,
    unfreeze_vit_layers: int = 0,
    unfreeze_lm_head: bool = False,
) -> list[ModuleRow]:
    """Set `requires_grad` of all parameters, like the reference, and return the parameter table.

    In a component with adapters, only the adapters are trained, except for the layers unfrozen by the last
    two arguments. Vision blocks after `--vision_select_layer` do not affect the output and are never trained.

    Args:
        unfreeze_vit_layers: first vision block to train even if the vision tower is frozen; negative values
            count from the end, 0 disables.
        unfreeze_lm_head: train the output head even if the language model is frozen.
    """
    tower = model.vision_model
    tower.requires_grad_(not freeze_backbone and not model.config.use_backbone_lora)
    model.language_model.requires_grad_(not freeze_llm and not model.config.use_llm_lora)
    model.mlp1.requires_grad_(not freeze_mlp)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.requires_grad_(True)
    if unfreeze_lm_head:
        model.language_model.get_output_embeddings().requires_grad_(True)
    if unfreeze_vit_layers:
        tower.encoder.layers[unfreeze_vit_layers:].requires_grad_(True)
    tower.encoder.layers[tower.layers_before(model.config.select_layer) :].requires_grad_(False)
    return table(model)


def table(model: InternVLChatModel) -> list[ModuleRow]:
    """Count total and trainable parameters by module, with separate rows for the adapters and the head."""
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        part = name.partition(".")[0]
        if ".lora_" in name:
            part += " (LoRA)"
        elif ".lm_head." in name:
            part += ".lm_head"
        groups.setdefault(part, []).append(parameter)
    rows = [
        ModuleRow(part, sum(map(parameter_count, ps)), sum(p.numel() for p in ps if p.requires_grad))
        for part, ps in groups.items()
    ]
    return [*rows, ModuleRow("total", sum(r.parameters for r in rows), sum(r.trainable for r in rows))]


def format_table(rows: list[ModuleRow]) -> str:
    """Format the table as text."""
    lines = [f"{'module':<26} {'parameters':>15} {'trainable':>15} {'share':>8}"]
    lines += [
        f"{r.module:<26} {r.parameters:>15,} {r.trainable:>15,} {r.trainable / max(r.parameters, 1):>8.2%}"
        for r in rows
    ]
    return "\n".join(lines)
