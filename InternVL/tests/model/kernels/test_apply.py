"""Models with and without kernels have the same parameters, losses and gradients."""

import copy

import pytest
import torch
from helpers import assert_within_rounding, terms_of
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from internvl_chat.model.kernels.apply import apply_kernels, fuse_norms, has_supervised_head
from internvl_chat.model.loss import next_token_losses

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "vocab_size": 29, "pad_token_id": 0}  # fmt: skip
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
CONFIGS = {
    "qwen2": Qwen2Config(**SMALL, num_key_value_heads=2),
    "qwen2 tied": Qwen2Config(**SMALL, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8),
    "qwen3_moe": Qwen3MoeConfig(**SMALL, num_key_value_heads=2, head_dim=8, **EXPERTS),
    "llama": LlamaConfig(**SMALL, num_key_value_heads=2),
}
CPU = torch.device("cpu")
POSITIONS = torch.tensor([2, 3, 7, 11])
IDS = torch.arange(1, 13)[None] * 5 % 29
TARGETS = torch.tensor([4, 4, 0, 28])


class Model(nn.Module):
    """The part of `InternVLChatModel` that the kernels need."""

    def __init__(self, config) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.language_model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
        self.loss_function = next_token_losses

    def losses(self) -> torch.Tensor:
        inputs = {"input_ids": IDS, "use_cache": False}
        return self.loss_function(self.language_model, inputs, POSITIONS, TARGETS)


def pair(config, device: torch.device = CPU) -> tuple[Model, Model]:
    """Return a plain model and a copy with kernels."""
    plain = Model(config)
    fast = copy.deepcopy(plain)
    apply_kernels(fast, device)
    return plain, fast


def gradients(model: Model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("device", [CPU, torch.device("cuda")], ids=str)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_same_losses_and_gradients(config, device, checkpointed: bool) -> None:
    """This test applies the GPU kernels on the CPU."""
    plain, fast = pair(config, device)
    assert has_supervised_head(fast) and not has_supervised_head(plain)
    logits = plain.language_model(input_ids=IDS, use_cache=False).logits[0, POSITIONS]
    expected = torch.nn.functional.cross_entropy(logits, TARGETS, reduction="none")
    if checkpointed:
        fast.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    runs = []
    mlp = fast.language_model.get_decoder().layers[-1].mlp
    mlp.register_forward_pre_hook(lambda _, x: runs.append(tuple(x[0].shape)))
    losses = fast.losses()
    assert_within_rounding(losses, expected, terms_of(plain))
    found, wanted = gradients(fast, losses.sum()), gradients(plain, expected.sum())
    assert found.keys() == wanted.keys()
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        assert_within_rounding(found[name], gradient, 3 * terms_of(plain), magnitude=largest, name=name)
    assert runs == [(1, 4, 32)] * (1 + checkpointed)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_losses_match_those_of_all_logits(config) -> None:
    plain = Model(config)
    logits = plain.language_model(input_ids=IDS, use_cache=False).logits[0, POSITIONS]
    expected = torch.nn.functional.cross_entropy(logits, TARGETS, reduction="none")
    assert_within_rounding(plain.losses(), expected, terms_of(plain))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_and_names_are_unchanged(config) -> None:
    plain, fast = pair(config)
    assert torch.equal(fast.language_model(input_ids=IDS).logits, plain.language_model(input_ids=IDS).logits)
    assert list(fast.state_dict()) == list(plain.state_dict())


def test_parameters_are_shared() -> None:
    model = Model(CONFIGS["qwen2 tied"])
    before = dict(model.named_parameters())
    apply_kernels(model, torch.device("cuda"), persistent_buffers=True)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    llm = model.language_model
    assert llm.get_output_embeddings().weight is llm.get_input_embeddings().weight


def test_modules_keep_the_methods_of_nn_module() -> None:
    """Attributes of the kernels must not shadow methods such as `nn.Module.buffers`, which FSDP2 calls."""
    model = Model(CONFIGS["qwen2"])
    apply_kernels(model, torch.device("cuda"), persistent_buffers=True)
    public = [name for name in vars(nn.Module) if not name.startswith("_")]
    methods = [name for name in public if callable(getattr(nn.Module, name))]
    for module in model.modules():
        for name in methods:
            assert callable(getattr(module, name)), f"{type(module).__name__}.{name}"


def test_other_architectures_are_unchanged() -> None:
    model = Model(PhiConfig(**SMALL))
    kinds = [type(module) for module in model.modules()]
    apply_kernels(model, torch.device("cuda"), persistent_buffers=True)
    assert not has_supervised_head(model)
    assert [type(module) for module in model.modules()] == kinds


def test_a_head_with_adapters_is_unchanged() -> None:
    model = Model(CONFIGS["qwen2"])
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["lm_head"]), model.language_model)
    apply_kernels(model, CPU)
    assert not has_supervised_head(model)


def test_norms_are_fused_only_on_a_gpu() -> None:
    _, on_cpu = pair(CONFIGS["qwen3"])
    _, on_gpu = pair(CONFIGS["qwen3"], torch.device("cuda"))
    assert not any(isinstance(module, nn.RMSNorm) for module in on_cpu.modules())
    fused = [name for name, module in on_gpu.named_modules() if isinstance(module, nn.RMSNorm)]
    assert len(fused) == 3 * 4 + 1  # two per layer, two for queries and keys, and the final one


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_norms_are_as_accurate(dtype: torch.dtype) -> None:
    x, upstream = (4 * torch.randn(2, 50, 32, generator=torch.Generator().manual_seed(1))).unbind(0)
    norms = nn.ModuleList([Model(CONFIGS["qwen2"]).language_model.get_decoder().norm])
    norms[0].weight.data += 0.3 * torch.randn(32, generator=torch.Generator().manual_seed(2))
    plain, fused = norms.to(dtype), copy.deepcopy(norms)
    fuse_norms(fused)
    assert isinstance(fused[0], nn.RMSNorm) and fused[0].eps == plain[0].variance_epsilon
    exact = torch.nn.RMSNorm(32, plain[0].variance_epsilon, dtype=torch.float64)
    exact.weight.data.copy_(plain[0].weight)

    def run(norm: nn.Module, x: torch.Tensor, upstream: torch.Tensor) -> list[torch.Tensor]:
        leaf = x.detach().clone().requires_grad_(True)
        norm.weight.grad = None
        out = norm(leaf)
        out.backward(upstream)
        return [out.detach().double(), leaf.grad.double(), norm.weight.grad.double()]

    x, upstream = x.to(dtype), upstream.to(dtype)
    wanted = run(exact, x.double(), upstream.double())
    for found, theirs, right in zip(
        run(fused[0], x, upstream), run(plain[0], x, upstream), wanted, strict=True
    ):
        error, of_theirs = ((t - right).norm() / right.norm() for t in (found, theirs))
        assert error <= 1.02 * of_theirs
