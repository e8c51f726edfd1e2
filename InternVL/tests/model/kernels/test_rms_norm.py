"""The lean norm is transformers' own: in float32 the same code, in half precision no less exact."""

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from internvl_chat.model.kernels import rms_norm
from internvl_chat.model.kernels.rms_norm import use_lean_norms


def make_norm(kind: type[nn.Module] = Qwen2RMSNorm, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    norm = kind(48)
    norm.weight.data += 0.3 * torch.randn(48)
    return norm.to(dtype)


def run(norm: nn.Module, x: torch.Tensor, upstream: torch.Tensor) -> list[torch.Tensor]:
    """Output, gradient of the input, gradient of the weight if it is trained."""
    leaf, norm.weight.grad = x.detach().clone().requires_grad_(True), None
    out = norm(leaf)
    out.backward(upstream.to(out.dtype))
    found = [out.detach(), leaf.grad] + ([norm.weight.grad] if norm.weight.requires_grad else [])
    return [tensor.double() for tensor in found]


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen2RMSNorm])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 7, 512])
def test_no_less_exact_than_transformers(monkeypatch, kind: type, dtype: torch.dtype, rows: int) -> None:
    monkeypatch.setattr(rms_norm, "_ROWS", rows)
    x, upstream = (4 * torch.randn(2, 50, 48, generator=torch.Generator().manual_seed(1))).to(dtype).unbind(0)
    plain, lean, exact = make_norm(kind, dtype), make_norm(kind, dtype), make_norm(kind, dtype).double()
    use_lean_norms(lean)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)  # transformers' norm computes in it by name
        wanted = run(exact, x.double(), upstream.double())
    for found, theirs, right in zip(*(run(m, x, upstream) for m in (lean, plain)), wanted, strict=True):
        error, of_theirs = ((t - right).norm() / right.norm() for t in (found, theirs))
        assert error <= 1.02 * of_theirs
        assert error < torch.finfo(dtype).eps


def test_forward_rounds_as_transformers_does() -> None:
    plain, lean = make_norm(), make_norm()
    use_lean_norms(lean)
    x = torch.randn(3, 1000, 48, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert (plain(x) == lean(x)).float().mean() > 0.999


@pytest.mark.parametrize("weight", [torch.float32, torch.float64])
def test_other_precisions_keep_transformers_code(weight: torch.dtype) -> None:
    plain, lean = make_norm(dtype=weight), make_norm(dtype=weight)
    use_lean_norms(lean)
    x = torch.randn(2, 5, 48)
    for found, expected in zip(run(lean, x, x), run(plain, x, x), strict=True):
        assert torch.equal(found, expected)


def test_what_is_kept_is_the_input_and_one_number_a_token() -> None:
    lean, sizes = make_norm(), []
    use_lean_norms(lean)
    x = torch.randn(64, 48).bfloat16().requires_grad_(True)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append((tuple(tensor.shape), tensor.dtype))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        lean(x)
    assert sorted(sizes, key=str) == [
        ((48,), torch.bfloat16),
        ((64, 1), torch.float32),
        ((64, 48), torch.bfloat16),
    ]


def test_frozen_weights_get_no_gradient() -> None:
    lean = make_norm().requires_grad_(False)
    use_lean_norms(lean)
    x = torch.randn(4, 48).bfloat16().requires_grad_(True)
    lean(x).sum().backward()
    assert lean.weight.grad is None and x.grad is not None


def test_no_token() -> None:
    lean = make_norm()
    use_lean_norms(lean)
    x = torch.zeros(1, 0, 48, dtype=torch.bfloat16, requires_grad=True)
    lean(x).sum().backward()
    assert x.grad.shape == x.shape and not lean.weight.grad.any()


def test_other_norms_are_left_alone() -> None:
    norm = nn.LayerNorm(48)
    use_lean_norms(norm)
    assert "forward" not in vars(norm)
