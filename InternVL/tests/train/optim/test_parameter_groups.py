"""Parameter groups match transformers (weight decay) and peft (LoRA+); learning rates follow the flags."""

import pytest
import torch
from model.conftest import make_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers import Trainer

from internvl_chat.model.lora.injection import add_lora
from internvl_chat.train.config import TrainConfig, resolve_run
from internvl_chat.train.flags import DataArguments, ModelArguments, RunArguments
from internvl_chat.train.freeze import set_trainable
from internvl_chat.train.optim.factory import make_optimizer
from internvl_chat.train.optim.parameter_groups import parameter_groups, rate_problems


def resolve(**flags):
    return resolve_run(RunArguments(output_dir="out", use_cpu=True, **flags), [])


def named_groups(groups, model):
    """Return learning rate, weight decay and parameter names of each group that is not empty."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [
        (group["lr"], group["weight_decay"], {names[p] for p in group["params"]})
        for group in groups
        if group["params"]
    ]


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("lora", [False, True])
def test_weight_decay_matches_transformers(norm, lora):
    model = make_model(vision={"norm_type": norm})
    if lora:
        add_lora(model, llm_rank=2, vision_rank=2)
    groups = parameter_groups(model, resolve(weight_decay=0.05, learning_rate=1e-4))
    (rate, decay, decayed), (other_rate, other_decay, others) = named_groups(groups, model)
    assert (rate, decay, other_rate, other_decay) == (1e-4, 0.05, 1e-4, 0.0)
    expected = set(Trainer.get_decay_parameter_names(None, model))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert (decayed, others) == (trained & expected, trained - expected)


def test_frozen_parameters_are_excluded():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    model[0].requires_grad_(False)
    assert sum(len(group["params"]) for group in parameter_groups(model, resolve())) == 2


@pytest.mark.parametrize("use_dora", [False, True])
def test_loraplus_matches_peft(use_dora):
    model = make_model()
    add_lora(model, llm_rank=4, vision_rank=2, use_dora=use_dora)
    set_trainable(model, freeze_mlp=True, freeze_backbone=True)
    run = resolve(learning_rate=1e-4, loraplus_lr_ratio=16, weight_decay=0.1)
    options = {"lr": 1e-4, "loraplus_lr_ratio": 16, "loraplus_weight_decay": 0.1}
    peft = create_loraplus_optimizer(model, torch.optim.AdamW, **options)
    found = named_groups(make_optimizer(run, model).param_groups, model)
    assert found == named_groups(peft.param_groups, model)
    assert [rate for rate, _, _ in found] == [1e-4, 16e-4]


def test_learning_rates_of_the_components():
    model = make_model()
    run = resolve(learning_rate=1e-5, vision_lr=1e-6, projector_lr=1e-4, weight_decay=0.1)
    groups = parameter_groups(model, run)
    assert [group["lr"] for group in groups] == [1e-5, 1e-5, 1e-6, 1e-6, 1e-4, 1e-4]
    rates = {name: rate for rate, _, names in named_groups(groups, model) for name in names}
    expected = {"vision_model": 1e-6, "mlp1": 1e-4, "language_model": 1e-5}
    assert rates == {name: expected[name.partition(".")[0]] for name, _ in model.named_parameters()}


def test_the_first_group_has_the_general_rate():
    """The rate of the first group is the one that is logged."""
    groups = parameter_groups(
        make_model(), resolve(learning_rate=1e-5, vision_lr=0, projector_lr=0, llm_lr=1e-3)
    )
    assert [(group["lr"], bool(group["params"])) for group in groups] == [
        (1e-5, False), (1e-5, False), (0.0, True), (0.0, True), (1e-3, True), (1e-3, True)
    ]  # fmt: skip


def test_the_ratio_multiplies_the_rate_of_the_component():
    model = make_model()
    add_lora(model, llm_rank=4)
    set_trainable(model, freeze_mlp=True, freeze_backbone=True)
    groups = parameter_groups(model, resolve(learning_rate=1.0, llm_lr=0.5, loraplus_lr_ratio=4.0))
    assert [group["lr"] for group in groups if group["params"]] == [0.5, 2.0]


@pytest.mark.parametrize(
    ("model", "run", "problems"),
    [
        ({}, {"vision_lr": 1e-6, "projector_lr": 1e-6, "llm_lr": 1e-6}, []),
        ({"freeze_backbone": True}, {"vision_lr": 1e-6}, ["--vision_lr 1e-06: has no effect"]),
        ({"freeze_backbone": True, "use_backbone_lora": 2}, {"vision_lr": 1e-6}, []),
        ({"freeze_backbone": True, "unfreeze_vit_layers": -1}, {"vision_lr": 1e-6}, []),
        ({"freeze_mlp": True}, {"projector_lr": 0.0}, ["--projector_lr 0: has no effect"]),
        ({"freeze_llm": True}, {"llm_lr": 1e-6}, ["--llm_lr 1e-06: has no effect"]),
        ({"freeze_llm": True, "use_llm_lora": 2}, {"llm_lr": 1e-6, "loraplus_lr_ratio": 2.0}, []),
        ({}, {"loraplus_lr_ratio": 16.0}, ["--loraplus_lr_ratio 16: has no effect without adapters"]),
        (
            {"use_llm_lora": 2},
            {"llm_lr": 1e-6, "loraplus_lr_ratio": 2.0, "deepspeed": '{"optimizer": {"type": "AdamW"}}'},
            ["--llm_lr, --loraplus_lr_ratio: have no effect on the optimizer of the DeepSpeed"],
        ),
    ],
)
def test_rates_without_effect_are_reported(model, run, problems):
    found = list(rate_problems(TrainConfig(ModelArguments(**model), DataArguments(), resolve(**run))))
    assert [text.startswith(start) for text, start in zip(found, problems, strict=True)] == [True] * len(
        found
    )
