"""Private library names that the package uses, each with a test that fails if its meaning changes."""

import ast
from pathlib import Path

import pytest
import torch
from test_architecture import FILES, PACKAGE
from torch import nn

# Python's own names and torch's multi-tensor operators are private in name only.
_NOT_PRIVATE = {"_asdict", "_fields", "_replace", "_make", "_exit", "_current_frames"}


def private_names(path) -> set[str]:
    """Return the private names that a file accesses on objects other than `self` and its own classes."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    own = {a.attr for a in attributes if isinstance(a.value, ast.Name) and a.value.id in ("self", "cls")}
    own |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    found = {a.attr for a in attributes} - own
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("internvl_chat"):
            found |= {alias.name for alias in node.names}
    private = {name for name in found if name.startswith("_") and not name.startswith("__")}
    return {name for name in private - _NOT_PRIVATE if not name.startswith("_foreach_")}


def peft_registers_custom_modules():
    from peft import LoraConfig, inject_adapter_in_model

    from internvl_chat.model.lora.layer import LoraLinear

    config = LoraConfig(r=2, target_modules=["0"])
    config._register_custom_module({nn.Linear: LoraLinear})
    model = inject_adapter_in_model(config, nn.Sequential(nn.Linear(3, 3)))
    assert type(model[0]) is LoraLinear


def torch_differentiates_softmax():
    scores = torch.randn(2, 5, requires_grad=True)
    above = torch.randn(2, 5)
    weights = scores.softmax(-1)
    weights.backward(above)
    found = torch._softmax_backward_data(above, weights.detach(), -1, scores.dtype)
    torch.testing.assert_close(found, scores.grad)


def bert_score_has_model_and_tokenizer():
    bert_score = pytest.importorskip("bert_score", reason="bert-score is not installed")
    source = ast.unparse(ast.parse(Path(bert_score.scorer.__file__).read_text(encoding="utf-8")))
    assert "self._tokenizer = " in source and "self._model = " in source


def transformers_reads_the_attention_by_name():
    """`set_attn_implementation` visits all modules, which is too slow for every decoding step."""
    from transformers import AttentionInterface, Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=9, num_hidden_layers=1, **sizes)).eval()
    calls = []

    def attend(module, query, key, value, attention_mask, **options):
        calls.append(attention_mask)
        return query.transpose(1, 2), None

    AttentionInterface.register("test of a private name", attend)
    model.config._attn_implementation = "test of a private name"
    model(torch.zeros(1, 3, dtype=torch.long), use_cache=False)
    assert calls == [None]


TESTS = {
    ("inference/cached_attention.py", "_attn_implementation"): transformers_reads_the_attention_by_name,
    ("model/lora/injection.py", "_register_custom_module"): peft_registers_custom_modules,
    ("model/kernels/cpu/blocked_attention.py", "_softmax_backward_data"): torch_differentiates_softmax,
    ("metrics/bertscore.py", "_model"): bert_score_has_model_and_tokenizer,
    ("metrics/bertscore.py", "_tokenizer"): bert_score_has_model_and_tokenizer,
}


@pytest.mark.parametrize("name", TESTS, ids=":".join)
def test_private_name_means_what_it_did(name):
    TESTS[name]()


def test_no_other_private_name_is_used():
    found = {(str(path.relative_to(PACKAGE)), name) for path in FILES for name in private_names(path)}
    assert found == TESTS.keys()
