"""Parameter groups of the optimizer, by weight decay and learning rate (per component, LoRA+)."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers.trainer_pt_utils import get_parameter_names

from internvl_chat.train.config import RunConfig, TrainConfig

# Name patterns of parameters without weight decay, as in transformers.
_NO_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
# Name parts of parameters whose learning rate `--loraplus_lr_ratio` multiplies, as in peft.
_LORAPLUS = (".lora_B.", ".lora_magnitude_vector.")
# Component -> flag for its learning rate.
_RATE_FLAGS = {"vision_model": "vision_lr", "mlp1": "projector_lr", "language_model": "llm_lr"}


def parameter_groups(model: nn.Module, run: RunConfig) -> list[dict[str, Any]]:
    """Return the parameter groups of the trainable parameters; biases and norms get no weight decay.

    The first two groups have the learning rate `--learning_rate`, one with and one without weight decay. They
    may be empty. Groups with other learning rates follow.
    """
    decayed = set(get_parameter_names(model, [nn.LayerNorm], _NO_DECAY))
    groups: dict[float, tuple[list[nn.Parameter], list[nn.Parameter]]] = {run.learning_rate: ([], [])}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            pair = groups.setdefault(peak_learning_rate(name, run), ([], []))
            pair[name not in decayed].append(parameter)
    first, *others = [
        {"params": parameters, "weight_decay": decay, "lr": rate}
        for rate, pair in groups.items()
        for parameters, decay in zip(pair, (run.weight_decay, 0.0), strict=True)
    ]
    return [first, others[0], *(group for group in others[1:] if group["params"])]


def peak_learning_rate(name: str, run: RunConfig) -> float:
    """Return the peak learning rate of a parameter."""
    flag = _RATE_FLAGS.get(name.partition(".")[0])
    rate = getattr(run, flag) if flag else None
    ratio = run.loraplus_lr_ratio if any(part in name for part in _LORAPLUS) else 1.0
    return (run.learning_rate if rate is None else rate) * ratio


def rate_problems(config: TrainConfig) -> Iterator[str]:
    """Yield an error message for each learning-rate flag that has no effect."""
    model, run = config.model, config.run
    trained = {
        "vision_lr": not model.freeze_backbone or model.use_backbone_lora or model.unfreeze_vit_layers,
        "projector_lr": not model.freeze_mlp,
        "llm_lr": not model.freeze_llm or model.use_llm_lora or model.unfreeze_lm_head,
    }
    given = {flag: value for flag in trained if (value := getattr(run, flag)) is not None}
    for flag, value in given.items():
        if not trained[flag]:
            yield f"--{flag} {value:g}: has no effect, because the component is frozen; remove the flag"
    if run.loraplus_lr_ratio != 1:
        given["loraplus_lr_ratio"] = run.loraplus_lr_ratio
        if not (model.use_llm_lora or model.use_backbone_lora):
            yield (
                f"--loraplus_lr_ratio {run.loraplus_lr_ratio:g}: has no effect without adapters; add "
                "--use_llm_lora"
            )
    if given and "optimizer" in (run.deepspeed or {}):
        flags = ", ".join(f"--{flag}" for flag in given)
        yield (
            f"{flags}: have no effect on the optimizer of the DeepSpeed configuration; remove its "
            '"optimizer" section'
        )
