"""4-bit base weights: which layers are quantized, and that losses and gradients match peft's own layers."""

import pytest
import torch
from helpers import assert_within_rounding, needs_bitsandbytes, terms_of
from model.conftest import make_model, make_record, pack, run_alone
from peft import LoraConfig, inject_adapter_in_model

from internvl_chat.model.flops import count_flops
from internvl_chat.model.lora import quantization
from internvl_chat.model.lora.injection import add_lora, llm_targets, lora_layers
from internvl_chat.model.lora.quantization import (
    dequantized,
    is_quantized_weight,
    parameter_count,
    quantization_bytes,
    quantize_decoder,
)
from internvl_chat.train.freeze import set_trainable, table
from internvl_chat.utils.errors import ModelError, UsageError


def quantized_model():
    model = make_model()
    quantize_decoder(model)
    return model


def quantized_names(model):
    return {name for name, p in model.named_parameters() if hasattr(p, "quant_state")}


def step(model):
    """Return the loss of a record and the gradients of the adapters."""
    model.train()
    loss = model(**pack([make_record((1, 2))], labels=True)).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@needs_bitsandbytes
def test_the_decoder_is_quantized_and_nothing_else():
    model, original = quantized_model(), make_model().state_dict()
    names = quantized_names(model)
    layers = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert len(names) == 2 * len(layers)
    assert names == {name for name in original if name.startswith("language_model.model.layers.")
                     and name.endswith(tuple(f"{layer}.weight" for layer in layers))}  # fmt: skip
    assert names == {name for name in original if is_quantized_weight(name)}
    for name, parameter in model.named_parameters():
        if name not in names:
            assert torch.equal(parameter, original[name]), name
        else:
            assert not parameter.requires_grad and parameter.dtype == torch.uint8
            # Half a byte per weight.
            assert parameter.nbytes == original[name].numel() / 2


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantized_is_the_weight_of_the_layer(dtype):
    from bitsandbytes.functional import dequantize_4bit

    model = make_model().to(dtype)
    quantize_decoder(model)
    original = dict(make_model().named_parameters())
    for name in quantized_names(model):
        weight = model.get_parameter(name)
        found = dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(found, dequantized(original[name].detach()).to(dtype))
        # NF4's largest gap between levels is 0.3 of the block's maximum, and rounding errs by at most half.
        error = (found - original[name]).abs().max() / original[name].abs().max()
        assert 0.01 < error < 0.17


@needs_bitsandbytes
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_loss_and_gradients_match_peft(options):
    own, peft = quantized_model(), quantized_model()
    add_lora(own, llm_rank=4, dropout=0.0, **options)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(llm_targets(peft.language_model)), **options)
    peft.language_model.is_loaded_in_4bit = True  # as after loading with transformers
    inject_adapter_in_model(config, peft.language_model)
    assert {type(layer).__name__ for layer in lora_layers(peft).values()} == {"Linear4bit"}
    set_trainable(own, freeze_mlp=True, freeze_backbone=True)
    generator = torch.Generator().manual_seed(0)
    adapters = {name: p for name, p in own.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in adapters.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    assert not peft.load_state_dict(adapters, strict=False).unexpected_keys
    for name, parameter in peft.named_parameters():
        parameter.requires_grad_(name in adapters)
    loss, gradients = step(own)
    expected_loss, expected = step(peft)
    terms = terms_of(own.vision_model) + terms_of(make_model().language_model)
    assert_within_rounding(loss, expected_loss, terms)
    assert gradients.keys() == expected.keys() == adapters.keys()
    for name, gradient in gradients.items():
        assert_within_rounding(gradient, expected[name], 3 * terms, name=name)


@needs_bitsandbytes
def test_evaluation_changes_neither_weights_nor_gradients():
    """On some CPUs, bitsandbytes repacks weights in evaluation mode, in a layout without a backward pass."""
    model = quantized_model()
    add_lora(model, llm_rank=4, dropout=0.0)
    set_trainable(model, freeze_mlp=True, freeze_backbone=True)
    _, before = step(model)
    model.zero_grad()
    with torch.inference_mode():
        run_alone(model.eval(), make_record((1,)))
    _, after = step(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(gradient, before[name]) for name, gradient in after.items())


@needs_bitsandbytes
def test_counts_are_those_of_the_weights():
    model, original = quantized_model(), make_model()
    set_trainable(model, freeze_llm=True, freeze_mlp=True)
    set_trainable(original, freeze_llm=True, freeze_mlp=True)
    assert table(model) == table(original)
    assert count_flops(model) == count_flops(original)
    assert sum(map(parameter_count, model.parameters())) == sum(p.numel() for p in original.parameters())


@needs_bitsandbytes
def test_bytes_by_hand():
    model = quantized_model()
    # Per block of 64 weights, a scale of one byte; per started block of 256 scales, a float32 scale.
    sizes = [64 * 64] * 2 + [64 * 32] * 2 + [64 * 256] * 3
    scales = sum(size // 64 + 4 * -(-size // 64 // 256) for size in sizes)
    assert quantization_bytes(model) == 2 * scales + 64 * 256 * 4
    assert quantization_bytes(make_model()) == 0


@needs_bitsandbytes
def test_a_model_with_adapters_is_not_quantized():
    model = make_model()
    add_lora(model, llm_rank=2)
    with pytest.raises(ModelError, match="merge the adapters first"):
        quantize_decoder(model)


def test_missing_bitsandbytes(monkeypatch):
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"bitsandbytes .* \(pip install 'm3llm\[quantization\]'\)"):
        quantize_decoder(make_model())
