"""Expert weights under the names of checkpoint files and of transformers' model."""

from pathlib import Path

import pytest
import torch
from model.conftest import load, make_record, run_alone, small_published_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from internvl_chat.model.io.checkpoint import save_model
from internvl_chat.model.io.experts import split_experts, stack_experts
from internvl_chat.utils.errors import ModelError

LAYER = "language_model.model.layers.0.mlp.experts"


def read(tensors: dict[str, torch.Tensor]) -> dict:
    return {name: lambda tensor=tensor: tensor for name, tensor in tensors.items()}


def test_names_and_order_of_the_matrices() -> None:
    """The gate comes before the up projection, as in transformers' forward pass."""
    files = {
        f"{LAYER}.{expert}.{kind}_proj.weight": torch.full(shape, 10.0 * expert + number)
        for expert in (1, 0)
        for number, (kind, shape) in enumerate({"gate": (2, 3), "up": (2, 3), "down": (3, 2)}.items())
    }
    files["language_model.model.layers.0.mlp.gate.weight"] = torch.ones(2, 3)
    stacked = {name: function() for name, function in stack_experts(read(files)).items()}
    assert stacked.keys() == {
        "language_model.model.layers.0.mlp.gate.weight", f"{LAYER}.gate_up_proj", f"{LAYER}.down_proj"
    }  # fmt: skip
    assert stacked[f"{LAYER}.gate_up_proj"][:, :, 0].tolist() == [[0, 0, 1, 1], [10, 10, 11, 11]]
    assert stacked[f"{LAYER}.down_proj"][:, 0, 0].tolist() == [2, 12]
    back = split_experts(stacked)
    assert back.keys() == files.keys()
    assert all(torch.equal(back[name], files[name]) for name in files)
    assert stack_experts(read(stacked)).keys() == stacked.keys()


@pytest.mark.parametrize("missing", ["0.gate_proj", "1.down_proj"])
def test_missing_matrix(missing: str) -> None:
    kinds = ("gate_proj", "up_proj", "down_proj")
    files = {f"{LAYER}.{i}.{kind}.weight": torch.ones(2, 2) for i in range(3) for kind in kinds}
    del files[f"{LAYER}.{missing}.weight"]
    with pytest.raises(ModelError, match=f"the weight {LAYER}.{missing}.weight is missing"):
        stack_experts(read(files))


def test_files_have_the_names_and_values_that_transformers_saves(tmp_path: Path) -> None:
    model = small_published_model("InternVL3.5-30B-A3B")
    save_model(model, tmp_path / "ours")
    model.language_model.save_pretrained(str(tmp_path / "theirs"))
    prefix = "language_model."
    ours = load_file(tmp_path / "ours/model.safetensors")
    ours = {name.removeprefix(prefix): tensor for name, tensor in ours.items() if name.startswith(prefix)}
    theirs = load_file(tmp_path / "theirs/model.safetensors")
    assert ours.keys() == theirs.keys() and sum(".experts." in name for name in ours) == 2 * 8 * 3
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    record, again = make_record((1,)), load(tmp_path / "ours")
    assert torch.equal(run_alone(again, record), run_alone(model, record))
    again.language_model = loaded
    assert torch.equal(run_alone(again, record), run_alone(model, record))


def test_tensors_are_not_copied() -> None:
    stacked = torch.arange(24.0).view(2, 4, 3)
    parts = split_experts({f"{LAYER}.gate_up_proj": stacked})
    assert all(p.untyped_storage().data_ptr() == stacked.untyped_storage().data_ptr() for p in parts.values())
    assert [tuple(p.shape) for p in parts.values()] == [(2, 3)] * 4
