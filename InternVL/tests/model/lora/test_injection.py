"""LoRA: target layers, ranks and names on disk; peft reads the saved adapters."""

from pathlib import Path

import pytest
import torch
from helpers import assert_within_rounding, terms_of
from model.conftest import CONTEXT, make_model, make_record, pack, run_alone, small_published_model
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, Phi3Config

from internvl_chat.model.io.adapter import BaseModel, save_adapter
from internvl_chat.model.io.checkpoint import load_model, save_model
from internvl_chat.model.io.weights import weights_digest
from internvl_chat.model.lora.injection import (
    VISION_TARGETS,
    adapter_config,
    adapter_key,
    add_lora,
    llm_targets,
    lora_dropout,
    lora_layers,
    lora_scaling,
    merged_weight,
    parameter_name,
    ranks_of,
    read_adapter_config,
    unwrapped_name,
)
from internvl_chat.model.lora.layer import LoraLinear
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel
from internvl_chat.train.freeze import ModuleRow, format_table, set_trainable, table
from internvl_chat.utils.errors import ModelError

LINEAR_LAYERS = {
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
}


def with_lora(seed: int = 1, **options) -> InternVLChatModel:
    """Return a model with adapters whose B matrices are nonzero, as after training."""
    model = make_model()
    add_lora(model, **options)
    change_adapters(model, seed)
    return model.eval()


@torch.no_grad()
def change_adapters(model: torch.nn.Module, seed: int = 1) -> None:
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            noise = 0.2 * torch.randn(parameter.shape, generator=rng)
            parameter.copy_(parameter * (1 + noise) if "magnitude" in name else noise)


VARIANTS: list[dict[str, bool]] = [{}, {"use_dora": True}, {"use_rslora": True, "use_dora": True}]


def trained(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# Target layers


def test_llm_targets() -> None:
    model = make_model()
    add_lora(model, llm_rank=4)
    assert set(lora_layers(model)) == {
        f"language_model.model.layers.{i}.{name}" for i in range(2) for name in LINEAR_LAYERS
    }
    assert (model.config.use_llm_lora, model.config.use_backbone_lora) == (4, 0)


def test_vision_targets() -> None:
    model = make_model()
    add_lora(model, vision_rank=3)
    assert set(lora_layers(model)) == {
        f"vision_model.encoder.layers.{i}.{name}"
        for i in range(2)
        for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert (model.config.use_llm_lora, model.config.use_backbone_lora) == (0, 3)


def test_ranks_of_both_towers() -> None:
    model = make_model()
    add_lora(model, llm_rank=4, vision_rank=2)
    ranks = {name.partition(".")[0]: layer.r["default"] for name, layer in lora_layers(model).items()}
    assert ranks == {"language_model": 4, "vision_model": 2}
    shapes = {
        tuple(p.shape) for n, p in model.named_parameters() if n.endswith("q_proj.lora_A.default.weight")
    }
    assert shapes == {(4, 64)}


def test_rank_0_adds_no_adapter() -> None:
    model = make_model()
    before = model.state_dict().keys()
    add_lora(model)
    assert lora_layers(model) == {} and model.state_dict().keys() == before


def test_targets_of_other_architectures() -> None:
    sizes = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
    phi = AutoModelForCausalLM.from_config(Phi3Config(**sizes, **heads))
    assert set(llm_targets(phi)) == {
        "self_attn.qkv_proj",
        "self_attn.o_proj",
        "mlp.gate_up_proj",
        "mlp.down_proj",
    }
    other = AutoModelForCausalLM.from_config(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=8))
    with pytest.raises(ModelError, match="GPT2LMHeadModel are unknown"):
        llm_targets(other)


def test_experts_have_no_adapters() -> None:
    model = small_published_model("InternVL3.5-30B-A3B")
    add_lora(model, llm_rank=4)
    assert set(lora_layers(model)) == {
        f"language_model.model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in "qkvo"
    }


# Output of adapters


def test_adapted_layer_by_hand() -> None:
    model = with_lora(llm_rank=4, vision_rank=2)
    for name, layer in lora_layers(model).items():
        weight, bias = layer.base_layer.weight, layer.base_layer.bias
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(2))
        expected = x @ weight.T + (0 if bias is None else bias) + 2 * (x @ a.T @ b.T)
        assert_within_rounding(layer(x), expected, terms_of(layer), name=name)


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_alpha_is_twice_the_rank(rank: int) -> None:
    model = make_model()
    add_lora(model, llm_rank=rank)
    assert {(x.lora_alpha["default"], x.scaling["default"]) for x in lora_layers(model).values()} == {
        (2 * rank, 2.0)
    }


@pytest.mark.parametrize(("rank", "scaling"), [(1, 2.0), (4, 4.0), (16, 8.0)])
def test_scale_of_rslora_by_hand(rank: int, scaling: float) -> None:
    """Alpha is 2 * rank, and the scale alpha / sqrt(rank)."""
    model = make_model()
    add_lora(model, llm_rank=rank, use_rslora=True)
    assert {layer.scaling["default"] for layer in lora_layers(model).values()} == {scaling}
    assert lora_scaling(rank, use_rslora=True) == scaling


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_loss_and_gradients_match_peft(options: dict[str, bool], dropout: float) -> None:
    model, peft = make_model(), make_model()
    add_lora(model, llm_rank=4, dropout=dropout, **options)
    config = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=dropout, target_modules=sorted(LINEAR_LAYERS), **options
    )
    inject_adapter_in_model(config, peft.language_model)
    assert not any(isinstance(layer, LoraLinear) for layer in lora_layers(peft).values())
    set_trainable(model, freeze_mlp=True, freeze_backbone=True)
    change_adapters(model)
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".lora_")[1].split(".")[0] for name in adapters} == {
        "A", "B", *(["magnitude_vector"] if "use_dora" in options else [])
    }  # fmt: skip
    assert not peft.load_state_dict(adapters, strict=False).unexpected_keys
    for name, parameter in peft.named_parameters():
        parameter.requires_grad_(name in adapters)
    if dropout:  # the fast layer draws different masks; DoRA uses peft's
        model.eval(), peft.eval()
    losses = [m(**pack([make_record((1, 2))], labels=True)).loss for m in (model, peft)]
    assert_within_rounding(*losses, terms_of(model))
    for loss in losses:
        loss.backward()
    for name, parameter in adapters.items():
        expected = peft.get_parameter(name).grad
        assert_within_rounding(parameter.grad, expected, 3 * terms_of(model), name=name)


@pytest.mark.parametrize("options", VARIANTS)
def test_new_adapters_do_not_change_the_output(options: dict[str, bool]) -> None:
    model, record = make_model(), make_record((2,))
    before = run_alone(model, record)
    add_lora(model, llm_rank=4, vision_rank=4, **options)
    found = run_alone(model.eval(), record)
    if "use_dora" in options:  # it divides each row by its norm and multiplies it again
        assert_within_rounding(found, before, terms_of(model))
    else:
        assert torch.equal(found, before)


def test_adapters_are_float32_on_a_bfloat16_model() -> None:
    model = make_model().to(torch.bfloat16)
    add_lora(model, llm_rank=2, vision_rank=2)
    dtypes = {(".lora_" in name, parameter.dtype) for name, parameter in model.named_parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    assert run_alone(model, make_record((1,))).dtype == torch.bfloat16


@pytest.mark.parametrize("dropout", [0.0, 0.05, 0.3])
def test_dropout(dropout: float) -> None:
    model = make_model()
    add_lora(model, llm_rank=2, dropout=dropout)
    assert lora_dropout(model) == dropout
    layer = next(iter(lora_layers(model).values()))
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(20, 64)
    outputs = [layer.train()(x) for _ in range(2)]
    assert torch.equal(*outputs) == (dropout == 0)
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_default_dropout() -> None:
    model = make_model()
    add_lora(model, llm_rank=2)
    assert lora_dropout(model) == 0.05


def test_merged_weight_by_hand() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    a, b = torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([[0.5], [2.0]])
    assert merged_weight(weight, a, b).tolist() == [[2.0, 2.0, 2.0], [8.0, 5.0, 2.0]]
    assert merged_weight(weight, a, b, scaling=1.0).tolist() == [[1.5, 2.0, 2.5], [6.0, 5.0, 4.0]]


def test_merged_weight_of_dora_by_hand() -> None:
    weight, magnitude = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([10.0, 3.0])
    a, b = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [0.0]])
    # The rows [3, 4] and [3, 0] have the norms 5 and 3.
    assert merged_weight(weight, a, b, 2.0, magnitude).tolist() == [[6.0, 8.0], [3.0, 0.0]]


def test_merging_rounds_once() -> None:
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 6, generator=rng).bfloat16()
    a, b = torch.randn(2, 6, generator=rng).bfloat16(), torch.randn(5, 2, generator=rng).bfloat16()
    exact = weight.double() + 2 * (b.double() @ a.double())
    found = merged_weight(weight, a, b)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.bfloat16())


# Trainable parameters


def test_only_adapters_are_trained() -> None:
    model = make_model()
    add_lora(model, llm_rank=4, vision_rank=4)
    set_trainable(model, freeze_llm=True, freeze_mlp=True, freeze_backbone=True)
    assert trained(model) == {n for n, _ in model.named_parameters() if ".lora_" in n}
    model(**pack([make_record((1,))], labels=True)).loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trained(model)


def test_lora_freezes_the_base_weights() -> None:
    model = make_model()
    add_lora(model, llm_rank=4)
    set_trainable(model)
    names = [name for name, _ in model.named_parameters()]
    assert trained(model) == {n for n in names if ".lora_" in n or not n.startswith("language_model.")}


@pytest.mark.parametrize(
    ("flag", "frozen"),
    [
        ({}, ()),
        ({"freeze_llm": True}, ("language_model.",)),
        ({"freeze_mlp": True}, ("mlp1.",)),
        ({"freeze_backbone": True}, ("vision_model.",)),
        ({"freeze_llm": True, "freeze_mlp": True, "freeze_backbone": True}, ("",)),
    ],
)
def test_freezing(flag: dict, frozen: tuple[str, ...]) -> None:
    model = make_model()
    model.requires_grad_(False)
    set_trainable(model, **flag)
    assert trained(model) == {n for n, _ in model.named_parameters() if not n.startswith(frozen)}


def test_train_only_the_head() -> None:
    model = make_model()
    set_trainable(model, freeze_llm=True, freeze_mlp=True, freeze_backbone=True, unfreeze_lm_head=True)
    assert trained(model) == {"language_model.lm_head.weight"}


@pytest.mark.parametrize(("first", "blocks"), [(1, {1}), (-1, {1}), (-2, {0, 1}), (2, set()), (0, set())])
def test_train_the_last_vision_blocks(first: int, blocks: set[int]) -> None:
    model = make_model()
    set_trainable(model, freeze_llm=True, freeze_mlp=True, freeze_backbone=True, unfreeze_vit_layers=first)
    expected = {
        n
        for n, _ in model.named_parameters()
        if n.startswith(tuple(f"vision_model.encoder.layers.{block}." for block in blocks))
    }
    assert trained(model) == expected


def test_parameter_table_by_hand() -> None:
    model = make_model()
    add_lora(model, llm_rank=4)
    rows = set_trainable(model, freeze_mlp=True, freeze_backbone=True)
    # q and o: 64 -> 64; k and v: 64 -> 32; gate and up: 64 -> 256; down: 256 -> 64.
    lora = 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 256))
    attention = 64 * 64 * 2 + 64 * 32 * 2 + 64 + 2 * 32
    llm = 64 * 64 + 2 * (attention + 3 * 64 * 256 + 2 * 64) + 64
    block = 4 * 32 * 32 + 4 * 32 + 2 * 32 * 128 + 128 + 32 + 2 * 2 * 32 + 2 * 32
    vision = 2 * block + 3 * 14 * 14 * 32 + 32 + 32 + 17 * 32
    mlp = 2 * 128 + 128 * 64 + 64 + 64 * 64 + 64
    assert {row.module: row for row in rows} == {
        "vision_model": ModuleRow("vision_model", vision, 0),
        "language_model": ModuleRow("language_model", llm, 0),
        "language_model (LoRA)": ModuleRow("language_model (LoRA)", lora, lora),
        "language_model.lm_head": ModuleRow("language_model.lm_head", 64 * 64, 0),
        "mlp1": ModuleRow("mlp1", mlp, 0),
        "total": ModuleRow("total", vision + llm + lora + 64 * 64 + mlp, lora),
    }
    assert rows == table(model)
    assert rows[-1].module == "total"


def test_parameter_table_as_text() -> None:
    lines = format_table([ModuleRow("mlp1", 1234567, 0), ModuleRow("total", 2000000, 500000)]).splitlines()
    assert lines[0].split() == ["module", "parameters", "trainable", "share"]
    assert lines[1].split() == ["mlp1", "1,234,567", "0", "0.00%"]
    assert lines[2].split() == ["total", "2,000,000", "500,000", "25.00%"]
    assert len({len(line) for line in lines}) == 1


# Parameter names and files


def test_peft_key_round_trip() -> None:
    model = with_lora(llm_rank=2, vision_rank=2, use_dora=True)
    for name in model.state_dict():
        key = adapter_key(name)
        assert key.startswith("base_model.model.") and ".default." not in key
        assert parameter_name(key) == name


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("ranks", [{"llm_rank": 4}, {"vision_rank": 3}, {"llm_rank": 4, "vision_rank": 2}])
def test_file_has_the_keys_of_peft(tmp_path: Path, ranks: dict[str, int], use_dora: bool) -> None:
    model = with_lora(**ranks, use_dora=use_dora)
    set_trainable(model, freeze_llm=True, freeze_mlp=True, freeze_backbone=True)
    save_adapter(model, tmp_path, BaseModel("base", "0"))
    targets = [
        *(LINEAR_LAYERS if "llm_rank" in ranks else ()),
        *(VISION_TARGETS if "vision_rank" in ranks else ()),
    ]
    wrapped = get_peft_model(make_model(), LoraConfig(r=2, target_modules=targets, use_dora=use_dora))
    assert (
        load_file(tmp_path / "adapter_model.safetensors").keys() == get_peft_model_state_dict(wrapped).keys()
    )


@pytest.mark.parametrize(
    ("wrapped", "plain"),
    [
        ("language_model.base_model.model.lm_head.weight", "language_model.lm_head.weight"),
        (
            "language_model.base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight",
            "language_model.model.layers.0.mlp.up_proj.lora_A.default.weight",
        ),
        (
            "vision_model.base_model.model.embeddings.class_embedding",
            "vision_model.embeddings.class_embedding",
        ),
        ("mlp1.0.weight", "mlp1.0.weight"),
        ("language_model.model.norm.weight", "language_model.model.norm.weight"),
    ],
)
def test_names_of_lora_wrapped_checkpoints(wrapped: str, plain: str) -> None:
    assert unwrapped_name(wrapped) == plain


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize(("llm", "vision"), [(4, 0), (0, 3), (4, 4), (4, 2), (2, 8)])
def test_one_configuration_for_both_towers(tmp_path: Path, llm: int, vision: int, options: dict) -> None:
    model = make_model()
    add_lora(model, llm_rank=llm, vision_rank=vision, dropout=0.1, **options)
    adapter_config(model, base="the/base", modules_to_save=["mlp1"]).save_pretrained(str(tmp_path))
    config = read_adapter_config(tmp_path)
    assert ranks_of(config) == (llm, vision)
    assert (config.use_dora, config.use_rslora) == ("use_dora" in options, "use_rslora" in options)
    assert config.lora_alpha == 2 * config.r
    assert (config.lora_dropout, config.base_model_name_or_path) == (0.1, "the/base")
    assert list(config.modules_to_save) == ["mlp1"]
    assert config.inference_mode is True


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"lora_alpha": 4}, "alpha 4"),
        ({"target_modules": "all-linear"}, "all-linear"),
        ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 2}}, "alpha = 2"),
        ({"alpha_pattern": {"q_proj": 64}}, "alpha_pattern {'q_proj': 64}"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern {'q_proj': 2}"),
        ({"init_lora_weights": "pissa_niter_4"}, "initialization 'pissa_niter_4'"),
    ],
)
def test_other_adapter_types_are_rejected(tmp_path: Path, changes: dict, word: str) -> None:
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **changes}
    LoraConfig(**options).save_pretrained(str(tmp_path))
    with pytest.raises(ModelError, match=word):
        read_adapter_config(tmp_path)


@pytest.mark.parametrize(
    ("ranks", "train_mlp"),
    [
        ({"llm_rank": 4}, False),
        ({"llm_rank": 4}, True),
        ({"vision_rank": 3}, True),
        ({"llm_rank": 4, "vision_rank": 4}, False),
        ({"llm_rank": 4, "vision_rank": 2}, True),
        ({"llm_rank": 4, "vision_rank": 2, "use_dora": True}, True),
        ({"llm_rank": 2, "use_rslora": True}, False),
    ],
)
def test_peft_reads_what_is_saved(tmp_path: Path, ranks: dict[str, int], train_mlp: bool) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_model(make_model(), base)
    model = with_lora(**ranks)
    set_trainable(model, freeze_mlp=not train_mlp, freeze_backbone=True)
    if train_mlp:
        with torch.no_grad():
            model.mlp1[1].weight.mul_(-1)
    save_adapter(model, adapter, BaseModel(str(base), weights_digest(base)))
    record = make_record((1, 2))
    expected = run_alone(model, record)
    assert (expected - run_alone(make_model(), record)).abs().max() > 0.1

    theirs = PeftModel.from_pretrained(load_model(base, image_context_id=CONTEXT), str(adapter)).eval()
    inputs = {"input_ids": record.input_ids[None], "pixel_values": record.pixel_values}
    assert_within_rounding(theirs(**inputs).logits[0], expected, terms_of(model))
    ours = load_model(adapter, image_context_id=CONTEXT).eval()
    assert_within_rounding(run_alone(ours, record), expected, terms_of(model))
