"""The LoRA layer against peft's: outputs, gradients, and cases delegated to peft."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from helpers import assert_within_rounding, terms_of
from model.conftest import make_model, make_record, pack, randomize
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.lora import layer as peft_layers
from torch import nn

from internvl_chat.model.io.adapter import BaseModel, save_adapter
from internvl_chat.model.io.checkpoint import save_model
from internvl_chat.model.io.weights import weights_digest
from internvl_chat.model.lora.injection import adapter_config, add_lora, lora_layers
from internvl_chat.model.lora.layer import LoraLinear

SHAPES = [(4, 16), (1, 4, 16), (2, 3, 16), (2, 1, 3, 16), (0, 16), (2, 0, 16), (16,)]


def make_pair(
    *, dropout: float = 0.0, bias: bool = True, rank: int = 4, dtype: torch.dtype = torch.float32
) -> tuple[LoraLinear, Linear]:
    """Return our layer and peft's, 16 -> 12, with the same weights, float32 adapters and a frozen base."""
    torch.manual_seed(0)
    base = nn.Linear(16, 12, bias=bias).to(dtype).requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout)
    ours, theirs = (
        kind(copy.deepcopy(base), "default", config=config, r=rank, lora_alpha=2 * rank)
        for kind in (LoraLinear, Linear)
    )
    with torch.no_grad():
        for name in ("lora_A", "lora_B"):
            weight = getattr(ours, name)["default"].weight
            weight.copy_(0.3 * torch.randn(weight.shape))
    theirs.load_state_dict(ours.state_dict())
    for one in (ours, theirs):
        for name in ("lora_A", "lora_B"):
            getattr(one, name).float()
    return ours, theirs


def draw(shape: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(layer: nn.Module, x: torch.Tensor, seed: int = 5) -> dict[str, torch.Tensor]:
    """Return the output for x and the gradients of x and of all trainable parameters."""
    x = x.clone().requires_grad_(True)
    torch.manual_seed(seed)
    output = layer(x)
    output.backward(draw(output.shape, output.dtype, seed=2))
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.requires_grad}
    layer.zero_grad()
    return {"output": output.detach(), "x": x.grad, **gradients}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], layer: nn.Module) -> None:
    """Compare results of `run` up to rounding; weight gradients are sums over rows."""
    assert found.keys() == expected.keys()
    rows = found["output"][..., 0].numel()
    for name in found:
        assert_within_rounding(found[name], expected[name], 2 * terms_of(layer) + rows, name=name)


# Equivalence to peft in float32


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients_match_peft(shape: tuple[int, ...], bias: bool) -> None:
    ours, theirs = make_pair(bias=bias)
    x = draw(shape)
    found = run(ours, x)
    assert found["output"].shape == (*shape[:-1], 12)
    assert_close(found, run(theirs, x), theirs)
    assert {name for name in found if "lora_" in name} == {"lora_A.default.weight", "lora_B.default.weight"}


def test_trained_base_layer() -> None:
    ours, theirs = make_pair()
    for layer in (ours, theirs):
        layer.base_layer.requires_grad_(True)
    found = run(ours, draw((2, 3, 16)))
    assert {"base_layer.weight", "base_layer.bias"} < found.keys()
    assert_close(found, run(theirs, draw((2, 3, 16))), theirs)


@pytest.mark.parametrize("dropout", [0.05, 0.5])
def test_dropout_matches_peft_for_the_same_seed(dropout: float) -> None:
    ours, theirs = make_pair(dropout=dropout)
    x = draw((6, 5, 16))
    found = run(ours.train(), x)
    assert_close(found, run(theirs.train(), x), theirs)
    assert not torch.equal(found["output"], run(ours, x, seed=6)["output"])
    assert_close(run(ours.eval(), x), run(theirs.eval(), x), theirs)


def test_non_contiguous_inputs() -> None:
    ours, theirs = make_pair()
    x = draw((16, 3, 2)).permute(2, 1, 0)
    assert not x.is_contiguous()
    assert_close(run(ours, x), run(theirs, x), theirs)


def test_scaling() -> None:
    ours, theirs = make_pair()
    before = ours(draw((3, 16)))
    for layer in (ours, theirs):
        layer.set_scale("default", 0.25)
    assert_within_rounding(ours(draw((3, 16))), theirs(draw((3, 16))), terms_of(theirs))
    assert not torch.allclose(ours(draw((3, 16))), before)


# Low precision


@pytest.mark.parametrize("shape", [(64, 16), (4, 8, 16)], ids=str)
def test_bfloat16_accuracy(shape: tuple[int, ...]) -> None:
    """Adapter weights and gradients stay float32; all results are within bfloat16 rounding."""
    ours, _ = make_pair(dtype=torch.bfloat16)
    x = draw(shape, torch.bfloat16)
    found, exact = run(ours, x), run(copy.deepcopy(ours).double(), x.double())
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        "output": torch.bfloat16,
        "x": torch.bfloat16,
        "lora_A.default.weight": torch.float32,
        "lora_B.default.weight": torch.float32,
    }
    for name, tensor in found.items():
        error = (tensor.double() - exact[name]).norm() / exact[name].norm()
        assert error < 2.0**-7, (name, float(error))


def test_dropout_in_bfloat16_keeps_the_mean() -> None:
    ours, _ = make_pair(dtype=torch.bfloat16, dropout=0.5)
    x = draw((1, 16), torch.bfloat16)
    torch.manual_seed(0)
    outputs = ours.train()(x.expand(4000, -1)).double()
    exact = copy.deepcopy(ours).double().eval()(x.double())
    deviation = outputs.std(dim=0) / 4000**0.5
    assert ((outputs.mean(dim=0) - exact[0]).abs() < 5 * deviation + 0.02).all()


def test_bfloat16_is_as_accurate_as_peft() -> None:
    ours, theirs = make_pair(dtype=torch.bfloat16)
    x = draw((200, 16), torch.bfloat16)
    exact = copy.deepcopy(theirs).double()(x.double())
    errors = [(layer(x).double() - exact).norm() for layer in (ours, theirs)]
    assert errors[0] < 1.5 * errors[1]


def test_nothing_is_computed_in_the_dtype_of_the_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer exists to avoid peft's expensive cast of the activations."""
    ours, theirs = make_pair(dtype=torch.bfloat16)
    seen: list[torch.dtype] = []
    original = nn.functional.linear

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        seen.append(x.dtype)
        return original(x, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", linear)
    ours(draw((3, 16), torch.bfloat16))
    assert set(seen) == {torch.bfloat16}
    theirs(draw((3, 16), torch.bfloat16))
    assert torch.float32 in seen


# Cases delegated to peft


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """List with one entry per call of peft's own forward pass."""
    grown: list[str] = []
    original = peft_layers.Linear.forward

    def forward(self: Linear, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        grown.append("peft")
        return original(self, x, *args, **kwargs)

    monkeypatch.setattr(peft_layers.Linear, "forward", forward)
    return grown


def test_common_case_does_not_call_peft(calls: list[str]) -> None:
    make_pair()[0](draw((3, 16)))
    assert calls == []


def test_disabled_adapters(calls: list[str]) -> None:
    ours, _ = make_pair()
    x = draw((2, 3, 16))
    adapted = ours(x)
    ours.enable_adapters(False)
    assert torch.equal(ours(x), ours.base_layer(x)) and len(calls) == 1
    ours.enable_adapters(True)
    assert torch.equal(ours(x), adapted) and len(calls) == 1


def test_merged_adapters(calls: list[str]) -> None:
    ours, _ = make_pair()
    x = draw((2, 3, 16))
    adapted, plain = ours(x), ours.base_layer(x)
    ours.merge()
    assert_within_rounding(ours(x), adapted, terms_of(ours))
    assert torch.equal(ours(x), ours.base_layer(x)) and len(calls) == 2
    ours.enable_adapters(False)  # peft unmerges
    # Merging and unmerging rounds the base weights.
    assert_within_rounding(ours(x), plain, 2 * terms_of(ours), magnitude=float(adapted.abs().max()))
    ours.enable_adapters(True)
    assert_within_rounding(ours(x), adapted, terms_of(ours))


def test_several_adapters(calls: list[str]) -> None:
    ours, theirs = make_pair()
    torch.manual_seed(3)
    for layer in (ours, theirs):
        config = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False)
        layer.update_layer("second", r=2, lora_alpha=4, config=config)
    theirs.load_state_dict(ours.state_dict())
    x = draw((2, 3, 16))
    for names, by_peft in (
        (["default", "second"], True),
        (["second"], False),
        (["elsewhere", "second"], False),
        (["elsewhere"], True),
    ):
        calls.clear()
        for layer in (ours, theirs):
            layer._active_adapter = names
        found = ours(x)
        assert bool(calls) == by_peft, names
        assert_within_rounding(found, theirs(x), terms_of(theirs))
    assert torch.equal(found, ours.base_layer(x))  # no adapter of that name here


def test_a_mixed_batch(calls: list[str]) -> None:
    ours, theirs = make_pair()
    ours.eval(), theirs.eval()
    x, names = draw((3, 16)), ["default", "__base__", "default"]
    found = ours(x, adapter_names=names)
    assert calls == ["peft"]
    assert torch.equal(found, theirs(x, adapter_names=names))
    torch.testing.assert_close(found[1], ours.base_layer(x)[1])


# Within the model


def by_peft(model: nn.Module) -> nn.Module:
    """Return a copy of the model in which the adapted layers use peft's own class."""
    model = copy.deepcopy(model)
    for layer in lora_layers(model).values():
        assert type(layer) is LoraLinear
        layer.__class__ = Linear
    return model


def test_add_lora_uses_this_layer_in_both_towers() -> None:
    model = make_model()
    add_lora(model, llm_rank=4, vision_rank=2)
    adapted = lora_layers(model).values()
    assert len(adapted) == 2 * 7 + 2 * 4
    assert {type(layer) for layer in adapted} == {LoraLinear}
    assert all(isinstance(layer, LoraLayer) for layer in adapted)


def test_names_and_initial_weights_match_peft() -> None:
    ours, theirs = make_model(), make_model()
    torch.manual_seed(0)
    add_lora(ours, llm_rank=4)
    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.05, target_modules=targets)
    inject_adapter_in_model(config, theirs.language_model)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


@pytest.mark.parametrize(("dropout", "checkpointing"), [(0.0, False), (0.3, False), (0.3, True)])
def test_training_matches_peft(dropout: float, checkpointing: bool) -> None:
    model = make_model()
    add_lora(model, llm_rank=4, vision_rank=2, dropout=dropout)
    randomize(model, 3)
    if checkpointing:
        model.checkpoint_layers(1)
    inputs, results = pack([make_record((1,)), make_record((2,), seed=1)], labels=True), []
    for one in (model, by_peft(model)):
        torch.manual_seed(7)
        loss = one.train()(**inputs).loss
        loss.backward()
        gradients = {name: p.grad for name, p in one.named_parameters() if p.grad is not None}
        results.append({"loss": loss.detach(), **gradients})
    found, expected = results
    assert found.keys() == expected.keys() and any(".lora_A." in name for name in found)
    assert_within_rounding(found.pop("loss"), expected.pop("loss"), terms_of(model))
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in found.items():
        assert_within_rounding(gradient, expected[name], 3 * terms_of(model), magnitude=largest, name=name)


# On disk


def test_saved_configuration_does_not_mention_this_layer(tmp_path: Path) -> None:
    model = make_model()
    add_lora(model, llm_rank=4, vision_rank=2, dropout=0.1)
    adapter_config(model, base="the/base", modules_to_save=[]).save_pretrained(str(tmp_path))
    text = (tmp_path / "adapter_config.json").read_text()
    assert "LoraLinear" not in text and "custom" not in text and "internvl" not in text
    plain = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["x"])
    plain.save_pretrained(str(tmp_path / "plain"))
    by_peft_alone = json.loads((tmp_path / "plain/adapter_config.json").read_text())
    assert json.loads(text).keys() == by_peft_alone.keys()


def test_peft_loads_saved_adapters(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_model(make_model(), base)
    model = make_model()
    add_lora(model, llm_rank=4)
    model.requires_grad_(False)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            nn.init.normal_(layer.lora_B["default"].weight, std=0.2)
    save_adapter(model, adapter, BaseModel(str(base), weights_digest(base)))
    theirs = PeftModel.from_pretrained(make_model(), str(adapter)).eval()
    assert {type(layer) for layer in lora_layers(theirs).values()} == {Linear}
    inputs = pack([make_record((1, 2))])
    expected, found = theirs(**inputs).logits, model.eval()(**inputs).logits
    assert_within_rounding(found, expected, terms_of(model))
    assert (found - make_model()(**inputs).logits).abs().max() > 0.01
