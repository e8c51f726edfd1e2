"""LoRA for the language model and the vision tower, injected with peft.

Adapted layers keep their original weights in `base_layer`; all other parameter names are unchanged.

Shapes: I input features, O output features, R rank.
"""

import math
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import cast_adapter_dtype
from torch import nn

from internvl_chat.model.lora.layer import LoraLinear
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel
from internvl_chat.utils.errors import ModelError

ADAPTER_NAME = "default"

VISION_TARGETS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")

_LLAMA_TARGETS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.down_proj",
    "mlp.up_proj",
)
# Module with all experts of a layer. It has stacked tensors, not linear layers, so that LoRA cannot adapt it.
_EXPERTS = "mlp.experts"
_MOE_TARGETS = _LLAMA_TARGETS[:4]
_PHI3_TARGETS = ("mlp.down_proj", "mlp.gate_up_proj", "self_attn.o_proj", "self_attn.qkv_proj")
# Names of the decoder's linear layers in all supported architectures.
DECODER_TARGETS = (*_LLAMA_TARGETS, *_PHI3_TARGETS)
# Name suffix of DoRA's norms in peft's weight files.
_MAGNITUDE = ".lora_magnitude_vector"


def llm_targets(language_model: nn.Module) -> tuple[str, ...]:
    """Return the name suffixes of the linear layers to adapt, as in the reference: attention and MLP.

    In a mixture of experts, only the attention is adapted.

    Raises:
        ModelError: the architecture is not supported.
    """
    names = [name for name, _ in language_model.named_modules()]
    for targets in (_LLAMA_TARGETS, _PHI3_TARGETS):
        if all(any(name.endswith(target) for name in names) for target in targets):
            return targets
    if any(name.endswith(_EXPERTS) for name in names):
        return _MOE_TARGETS
    raise ModelError(
        f"the LoRA targets of {type(language_model).__name__} are unknown; train the full model instead"
    )


def add_lora(
    model: InternVLChatModel,
    *,
    llm_rank: int = 0,
    vision_rank: int = 0,
    dropout: float = 0.05,
    use_dora: bool = False,
    use_rslora: bool = False,
) -> None:
    """Inject float32 adapters with alpha = 2 * rank, as in the reference; store the ranks in `model.config`.

    Args:
        model: model with its weights loaded, because DoRA starts from their norms.
        llm_rank: rank for the language model; 0 for no adapters.
        vision_rank: rank for the vision tower; 0 for no adapters.
        dropout: dropout probability of the adapters' input.
        use_dora: whether to also train the norm of each row of the weights (DoRA).
        use_rslora: whether to scale by alpha / sqrt(rank) instead of alpha / rank (rsLoRA).
    """
    towers = (
        (model.language_model, llm_rank, llm_targets),
        (model.vision_model, vision_rank, lambda _: VISION_TARGETS),
    )
    for tower, rank, targets in towers:
        if rank:
            config = _lora_config(rank, targets(tower), dropout, use_dora=use_dora, use_rslora=use_rslora)
            inject_adapter_in_model(config, tower, ADAPTER_NAME)
            cast_adapter_dtype(tower, ADAPTER_NAME)
    model.config.use_llm_lora, model.config.use_backbone_lora = llm_rank, vision_rank


def _lora_config(
    rank: int, targets: tuple[str, ...], dropout: float, *, use_dora: bool, use_rslora: bool
) -> LoraConfig:
    """Return the peft configuration of one tower."""
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=dropout,
        target_modules=list(targets),
        use_dora=use_dora,
        use_rslora=use_rslora,
    )
    config._register_custom_module({nn.Linear: LoraLinear})
    return config


def adapter_config(model: InternVLChatModel, *, base: str, modules_to_save: list[str]) -> LoraConfig:
    """Return one peft configuration for the adapters of the language model and the vision tower.

    Args:
        base: path or Hub id of the base model.
        modules_to_save: names of the modules that are stored in full with the adapters.
    """
    llm_rank, vision_rank = model.config.use_llm_lora, model.config.use_backbone_lora
    targets = llm_targets(model.language_model) if llm_rank else ()
    targets += VISION_TARGETS if vision_rank else ()
    layer = next(iter(lora_layers(model).values()))
    use_dora, use_rslora = layer.use_dora[ADAPTER_NAME], layer.use_rslora[ADAPTER_NAME]
    config = _lora_config(
        llm_rank or vision_rank, targets, lora_dropout(model), use_dora=use_dora, use_rslora=use_rslora
    )
    if llm_rank and vision_rank not in (0, llm_rank):
        config.rank_pattern = dict.fromkeys(VISION_TARGETS, vision_rank)
        config.alpha_pattern = dict.fromkeys(VISION_TARGETS, 2 * vision_rank)
    config.base_model_name_or_path = base
    config.modules_to_save = modules_to_save or None
    config.inference_mode = True
    return config


def ranks_of(config: LoraConfig) -> tuple[int, int]:
    """Return the LoRA ranks of the language model and the vision tower; 0 for no adapters.

    Args:
        config: configuration as returned by `adapter_config`.
    """
    targets = set(config.target_modules or ())
    vision = targets.issuperset(VISION_TARGETS)
    llm = bool(targets - set(VISION_TARGETS))
    vision_rank = (config.rank_pattern or {}).get(VISION_TARGETS[0], config.r) if vision else 0
    return (config.r if llm else 0), vision_rank


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Return the layers with adapters, keyed by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def lora_dropout(model: nn.Module) -> float:
    """Return the dropout probability of the model's adapters."""
    layer = next(iter(lora_layers(model).values()))
    return getattr(layer.lora_dropout[ADAPTER_NAME], "p", 0.0)


def adapter_key(name: str) -> str:
    """Return the key of a parameter in peft's weight file.

    >>> adapter_key("language_model.model.layers.0.mlp.up_proj.lora_A.default.weight")
    'base_model.model.language_model.model.layers.0.mlp.up_proj.lora_A.weight'
    >>> adapter_key("language_model.model.layers.0.mlp.up_proj.lora_magnitude_vector.default.weight")
    'base_model.model.language_model.model.layers.0.mlp.up_proj.lora_magnitude_vector'
    """
    name = name.replace(f"{_MAGNITUDE}.{ADAPTER_NAME}.weight", _MAGNITUDE)
    return "base_model.model." + name.replace(f".{ADAPTER_NAME}.", ".")


def parameter_name(key: str) -> str:
    """Return the parameter name for a key in peft's weight file; inverse of `adapter_key`."""
    name = key.removeprefix("base_model.model.")
    for part in (".lora_A.", ".lora_B."):
        name = name.replace(part, f"{part}{ADAPTER_NAME}.")
    return f"{name}.{ADAPTER_NAME}.weight" if name.endswith(_MAGNITUDE) else name


def unwrapped_name(name: str) -> str:
    """Return the parameter name for a weight name in a LoRA-wrapped checkpoint of the reference.

    >>> unwrapped_name("language_model.base_model.model.lm_head.weight")
    'language_model.lm_head.weight'
    """
    for tower in ("language_model.", "vision_model."):
        if name.startswith(tower + "base_model.model."):
            return tower + name.removeprefix(tower + "base_model.model.")
    return name


def lora_scaling(rank: int, use_rslora: bool) -> float:
    """Return the scale of the update B A: alpha / rank or, with rsLoRA, alpha / sqrt(rank).

    Alpha is 2 * rank.

    >>> lora_scaling(16, use_rslora=False), lora_scaling(16, use_rslora=True)
    (2.0, 8.0)
    """
    return 2 * rank / (math.sqrt(rank) if use_rslora else rank)


def merged_weight(
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float = 2.0,
    magnitude: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return W + s B A, computed in float32 and rounded to W's dtype: (O, I), (R, I), (O, R) -> (O, I).

    With DoRA, `magnitude` (O,) contains the norms to which the rows are scaled.
    """
    merged = weight.float() + scaling * (lora_b.float() @ lora_a.float())
    if magnitude is not None:
        merged *= (magnitude.float() / torch.linalg.norm(merged, dim=1)).unsqueeze(1)
    return merged.to(weight.dtype)


def read_adapter_config(folder: Path) -> LoraConfig:
    """Read `adapter_config.json`.

    Raises:
        ModelError: the file is missing, malformed, or not LoRA or DoRA with alpha = 2 * rank.
    """
    file = folder / "adapter_config.json"
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ModelError(f"{file}: not a LoRA configuration: {error}") from None
    targets = config.target_modules
    ranks, alphas = config.rank_pattern, config.alpha_pattern
    ratios = {config.lora_alpha / config.r} | {
        alphas.get(key, config.lora_alpha) / ranks.get(key, config.r) for key in ranks.keys() | alphas.keys()
    }
    # These initializations change the base model's weights.
    changes_base = str(config.init_lora_weights).startswith(("pissa", "olora", "loftq", "corda"))
    if ratios != {2.0} or not isinstance(targets, set | list) or changes_base:
        patterns = f", rank_pattern {ranks}, alpha_pattern {alphas}" if ranks or alphas else ""
        raise ModelError(
            f"{file}: expected LoRA or DoRA with a list of target modules and alpha = 2 * rank; found "
            f"{targets!r}, rank {config.r}, alpha {config.lora_alpha}{patterns}, initialization "
            f"{config.init_lora_weights!r}"
        )
    return config
