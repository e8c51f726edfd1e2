"""Gradients in persistent buffers match autograd's over multiple steps."""

import copy

import pytest
import torch
from helpers import assert_within_rounding
from torch import nn

from internvl_chat.model.kernels.cpu.persistent_buffers import (
    PersistentGradient,
    PersistentHeadBuffers,
    use_persistent_buffers,
)
from internvl_chat.model.kernels.supervised_head import SupervisedHead

WIDTH, VOCABULARY = 6, 11


class Llm(nn.Module):
    """Embedding and head with transformers' accessor names."""

    def __init__(self, tied: bool = False, padding: int | None = None) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH, padding_idx=padding)
        self.head = SupervisedHead(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def get_input_embeddings(self):
        return self.words

    def get_output_embeddings(self):
        return self.head

    def set_input_embeddings(self, module):
        self.words = module


class Model(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.language_model = Llm(**options)

    def forward(self, ids):
        llm = self.language_model
        hidden = llm.get_input_embeddings()(ids).tanh()
        return llm.get_output_embeddings()(hidden[0], ids[0].flip(0)).square().sum()


PACKS = [torch.tensor([[1, 2, 2, 0, 10]]), torch.tensor([[3, 2, 0]]), torch.tensor([[7, 7, 7, 7]])]


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"padding": 2}], ids=["plain", "tied", "padding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_gradients_over_packs_and_steps(options, dtype):
    plain = Model(**options).to(dtype)
    kept = copy.deepcopy(plain)
    use_persistent_buffers(kept.language_model)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1) for model in (plain, kept)]
    for step in range(3):
        for model, optimizer in zip((plain, kept), optimizers, strict=True):
            optimizer.zero_grad(set_to_none=True)
            for ids in PACKS[step:]:
                model(ids).backward()
        for (name, a), b in zip(plain.named_parameters(), kept.parameters(), strict=True):
            # bfloat16 products are summed in float32; head and embedding round each pack's gradient and sum.
            terms = 2 * (WIDTH + VOCABULARY) if dtype == torch.float32 else 4 * len(PACKS[step:])
            assert_within_rounding(b.grad, a.grad, terms, dtype=dtype, name=f"{name}, step {step}")
        for optimizer in optimizers:
            optimizer.step()


def test_gradients_reuse_their_buffers():
    model = Model()
    use_persistent_buffers(model.language_model)
    pointers = []
    for _ in range(3):
        model.zero_grad(set_to_none=True)
        model(PACKS[0]).backward()
        pointers.append([p.grad.data_ptr() for p in model.parameters()])
    assert pointers[0] == pointers[1] == pointers[2]


def test_frozen_weights_get_no_gradient():
    model = Model()
    model.requires_grad_(False)
    use_persistent_buffers(model.language_model)
    assert type(model.language_model.words) is nn.Embedding
    hidden = torch.randn(2, 6, requires_grad=True)
    model.language_model.head(hidden, torch.tensor([1, 2])).sum().backward()
    assert hidden.grad is not None and model.language_model.head.weight.grad is None


@pytest.mark.parametrize("trained", [True, False])
def test_logits_in_use_are_not_overwritten(trained):
    """Three forward passes run before any backward pass, then two more, the last with more rows."""
    plain = Model().requires_grad_(trained)
    kept = copy.deepcopy(plain)
    use_persistent_buffers(kept.language_model)
    rng = torch.Generator().manual_seed(0)
    for rounds in (3, 1, 1):
        hiddens = [torch.randn(4 + rounds, 6, generator=rng) for _ in range(rounds)]
        targets = [torch.randint(11, (4 + rounds,), generator=rng) for _ in hiddens]
        found = []
        for model in (plain, kept):
            model.zero_grad(set_to_none=True)
            leaves = [hidden.clone().requires_grad_(True) for hidden in hiddens]
            head = model.language_model.head
            losses = [head(x, t).sum() for x, t in zip(leaves, targets, strict=True)]
            for loss in reversed(losses):
                loss.backward()
            found.append([leaf.grad for leaf in leaves] + ([head.weight.grad] if trained else []))
        for one, other in zip(*found, strict=True):
            assert_within_rounding(other, one, 2 * (WIDTH + VOCABULARY) + len(hiddens[0]) * rounds)


def test_logits_buffer_is_reused_and_grows():
    head = Model().language_model.head
    memory = PersistentHeadBuffers(PersistentGradient(head.weight))
    pointers = []
    for rows in (3, 2, 3, 5, 4):
        logits = memory.take_logits(rows, torch.zeros(1, 6), head.weight)
        assert logits.shape == (rows, 11)
        pointers.append(logits.data_ptr())
        memory.give_back(logits)
    assert pointers[0] == pointers[1] == pointers[2] and pointers[3] == pointers[4] != pointers[0]


def test_a_copy_has_its_own_weights_and_gradients():
    model = Model()
    use_persistent_buffers(model.language_model)
    model(PACKS[0]).backward()
    other = copy.deepcopy(model)
    other.zero_grad(set_to_none=True)
    before = [p.grad.clone() for p in model.parameters()]
    with torch.no_grad():
        other.language_model.words.weight.zero_()
    fresh = Model()
    with torch.no_grad():
        fresh.language_model.words.weight.zero_()
    loss, expected = other(PACKS[1]), fresh(PACKS[1])
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for mine, right in zip(other.parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, right.grad)
    assert all(torch.equal(p.grad, b) for p, b in zip(model.parameters(), before, strict=True))


def test_training_after_inference():
    model = Model()
    use_persistent_buffers(model.language_model)
    with torch.inference_mode():
        model(PACKS[0])
    model(PACKS[0]).backward()
    assert all(p.grad is not None for p in model.parameters())
