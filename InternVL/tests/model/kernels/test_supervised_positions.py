"""What the decoder leaves out changes neither losses nor gradients."""

import copy

import pytest
import torch
from helpers import assert_within_rounding, terms_of
from peft import LoraConfig, inject_adapter_in_model
from transformers import AutoModelForCausalLM, LlamaConfig, PhiConfig, Qwen2Config, Qwen3Config

from internvl_chat.model.kernels.supervised_positions import is_lean, make_lean

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "vocab_size": 29, "pad_token_id": 0}  # fmt: skip
CONFIGS = {
    "qwen2": Qwen2Config(**SMALL, num_key_value_heads=2),
    "qwen2 tied": Qwen2Config(**SMALL, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8),
    "llama": LlamaConfig(**SMALL, num_key_value_heads=2),
}


def make_llm(config, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(dtype).train()


def gradients(llm, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    llm.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in llm.named_parameters()}


PLACES = torch.tensor([2, 3, 7, 11])
IDS = torch.arange(1, 13)[None] * 5 % 29
TARGETS = torch.tensor([4, 4, 0, 28])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("recomputed", [False, True])
def test_losses_and_gradients_are_those_of_the_whole_decoder(config, recomputed: bool) -> None:
    plain = make_llm(config)
    lean = copy.deepcopy(plain)
    make_lean(lean)
    assert is_lean(lean) and not is_lean(plain)
    logits = plain(input_ids=IDS, use_cache=False).logits[0, PLACES]
    expected = torch.nn.functional.cross_entropy(logits, TARGETS, reduction="none")
    if recomputed:
        lean.gradient_checkpointing_enable({"use_reentrant": False})
    runs = []
    lean.get_decoder().layers[-1].mlp.register_forward_pre_hook(lambda _, x: runs.append(tuple(x[0].shape)))
    hidden = lean.get_decoder()(input_ids=IDS, use_cache=False, output_places=PLACES).last_hidden_state
    losses = lean.get_output_embeddings()(hidden[0], TARGETS)
    assert_within_rounding(losses, expected, terms_of(plain))
    found, wanted = gradients(lean, losses.sum()), gradients(plain, expected.sum())
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        assert_within_rounding(found[name], gradient, 3 * terms_of(plain), magnitude=largest, name=name)
    assert runs == [(1, 4, 32)] * (1 + recomputed)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_all_logits_are_there_when_asked_for(config) -> None:
    plain = make_llm(config)
    lean = copy.deepcopy(plain)
    make_lean(lean)
    assert torch.equal(lean(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    assert list(lean.state_dict()) == list(plain.state_dict())


def test_other_kinds_of_layers_are_left_as_they_are() -> None:
    llm = make_llm(PhiConfig(**SMALL))
    kinds = [type(module) for module in llm.modules()]
    make_lean(llm)
    assert not is_lean(llm)
    assert [type(module) for module in llm.modules()] == kinds


def test_again_changes_nothing_and_a_new_head_is_lean_again() -> None:
    llm = make_llm(CONFIGS["qwen2"])
    make_lean(llm)
    kind = type(llm.get_decoder().layers[-1])
    llm.resize_token_embeddings(31, mean_resizing=False)
    assert not is_lean(llm)
    make_lean(llm)
    assert is_lean(llm) and type(llm.get_decoder().layers[-1]) is kind


def test_a_head_with_adapters_is_not_lean() -> None:
    llm = make_llm(CONFIGS["qwen2"])
    make_lean(llm)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["lm_head"]), llm)
    assert not is_lean(llm)
