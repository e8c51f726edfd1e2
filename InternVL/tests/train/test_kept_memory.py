"""Gradients in kept memory are autograd's own, step after step."""

import copy

import pytest
import torch
from torch import nn

from internvl_chat.train.kept_memory import keep_vocabulary_memory


class Llm(nn.Module):
    """A head over an embedding, with transformers' names for both."""

    def __init__(self, tied: bool = False, padding: int | None = None) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6, padding_idx=padding)
        self.head = nn.Linear(6, 11, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def get_input_embeddings(self):
        return self.words

    def get_output_embeddings(self):
        return self.head


class Model(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.language_model = Llm(**options)

    def forward(self, ids):
        llm = self.language_model
        return (
            llm.get_output_embeddings()(llm.get_input_embeddings()(ids).tanh()).logsumexp(-1).square().sum()
        )


PACKS = [torch.tensor([[1, 2, 2, 0, 10]]), torch.tensor([[3, 2, 0]]), torch.tensor([[7, 7, 7, 7]])]


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"padding": 2}], ids=["plain", "tied", "padding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_gradients_over_packs_and_steps(options, dtype):
    plain = Model(**options).to(dtype)
    kept = copy.deepcopy(plain)
    keep_vocabulary_memory(kept)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1) for model in (plain, kept)]
    for step in range(3):
        for model, optimizer in zip((plain, kept), optimizers, strict=True):
            optimizer.zero_grad(set_to_none=True)
            for ids in PACKS[step:]:
                model(ids).backward()
        for (name, a), b in zip(plain.named_parameters(), kept.parameters(), strict=True):
            tolerance = 1e-6 if dtype == torch.float32 else 0.05
            assert torch.allclose(a.grad, b.grad, atol=tolerance, rtol=1e-2), f"{name}, step {step}"
        for optimizer in optimizers:
            optimizer.step()


def test_memory_is_the_same_in_every_step():
    model = Model()
    keep_vocabulary_memory(model)
    places = []
    for _ in range(3):
        model.zero_grad(set_to_none=True)
        model(PACKS[0]).backward()
        places.append([p.grad.data_ptr() for p in model.parameters()])
    assert places[0] == places[1] == places[2]


def test_frozen_weights_keep_their_modules():
    model = Model()
    model.requires_grad_(False)
    keep_vocabulary_memory(model)
    llm = model.language_model
    assert "forward" not in vars(llm.words)
    assert "forward" not in vars(llm.head)


def test_the_head_passes_its_input_gradient_on():
    model = Model()
    keep_vocabulary_memory(model)
    x = torch.randn(2, 3, 6, requires_grad=True)
    model.language_model.head(x).sum().backward()
    expected = model.language_model.head.weight.detach().sum(0).expand(2, 3, 6)
    torch.testing.assert_close(x.grad, expected)
