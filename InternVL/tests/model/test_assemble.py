"""Models assembled from parts, with all naming schemes and file formats."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from helpers import assert_within_rounding, terms_of
from model.conftest import CONTEXT, make_model, make_record, run_alone, small_published_model
from safetensors.torch import load_file, save_file

from internvl_chat.model.assemble import assemble_model
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel
from internvl_chat.utils.errors import ModelError

RECORD = make_record((2, 1))


@pytest.fixture
def whole(request: pytest.FixtureRequest) -> InternVLChatModel:
    return getattr(request, "param", make_model)()


@pytest.fixture
def parts(tmp_path: Path, whole: InternVLChatModel) -> dict[str, Path]:
    """Parts of the model as other tools save them: language model by transformers, projector by PyTorch."""
    vision, llm, mlp = tmp_path / "vit", tmp_path / "llm", tmp_path / "mlp.bin"
    vision.mkdir()
    raw = {**whole.config.to_dict()["vision_config"], "auto_map": {"AutoModel": "modeling_intern_vit.X"}}
    (vision / "config.json").write_text(json.dumps(raw))
    save_file(whole.vision_model.state_dict(), vision / "model.safetensors")
    whole.language_model.save_pretrained(str(llm))
    torch.save(whole.mlp1.state_dict(), mlp)
    return {"vision_folder": vision, "llm_folder": llm, "mlp_file": mlp}


def assemble(parts: dict[str, Path | None], **options) -> InternVLChatModel:
    settings = {"downsample_ratio": 0.5, "image_context_id": CONTEXT, "dtype": torch.float32, "attn": "sdpa"}
    return assemble_model(**parts, **{**settings, **options}).eval()


def with_experts() -> InternVLChatModel:
    return small_published_model("InternVL3.5-30B-A3B")


@pytest.mark.parametrize("whole", [make_model, with_experts], indirect=True)
def test_assembled_model_has_the_weights_of_its_parts(
    parts: dict[str, Path], whole: InternVLChatModel
) -> None:
    model = assemble(parts)
    assert torch.equal(run_alone(model, RECORD), run_alone(whole, RECORD))
    assert model.config.ps_version == "v2" and model.config.tokens_per_tile == 4
    assert model.config.to_dict()["vision_config"]["auto_map"] == {"AutoModel": "modeling_intern_vit.X"}


def test_prefixed_names_and_other_files(
    parts: dict[str, Path], whole: InternVLChatModel, tmp_path: Path
) -> None:
    file = parts["vision_folder"] / "model.safetensors"
    torch.save(
        {f"vision_model.{n}": t for n, t in load_file(file).items()}, file.with_name("pytorch_model.bin")
    )
    file.unlink()
    prefixed = {f"mlp1.{name}": tensor for name, tensor in whole.mlp1.state_dict().items()}
    save_file(prefixed, tmp_path / "mlp.safetensors")
    model = assemble(parts | {"mlp_file": tmp_path / "mlp.safetensors"})
    assert torch.equal(run_alone(model, RECORD), run_alone(whole, RECORD))


def test_a_language_model_with_a_tied_head(tmp_path: Path, parts: dict[str, Path]) -> None:
    tied = make_model(llm={"tie_word_embeddings": True})
    tied.language_model.save_pretrained(str(tmp_path / "tied"))
    model = assemble(parts | {"llm_folder": tmp_path / "tied"})
    record = make_record()
    expected = tied.language_model(input_ids=record.input_ids[None], use_cache=False).logits[0]
    assert_within_rounding(run_alone(model, record), expected, terms_of(tied.language_model))


def test_without_a_projector_its_weights_are_random(parts: dict[str, Path], whole: InternVLChatModel) -> None:
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(assemble(parts | {"mlp_file": None}))
    one, same, other = (model.mlp1.state_dict() for model in models)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["1.weight"], other["1.weight"])
    assert torch.equal(one["0.weight"], torch.ones(128)) and torch.equal(one["0.bias"], torch.zeros(128))
    for name, width in (("1.weight", 128), ("1.bias", 128), ("3.weight", 64), ("3.bias", 64)):
        # torch's default initialization of a linear layer: uniform within 1 / sqrt(inputs)
        assert 0.9 < one[name].abs().max() * width**0.5 <= 1
    for name, tensor in whole.vision_model.state_dict().items():
        assert torch.equal(models[0].vision_model.state_dict()[name], tensor)


def test_options(parts: dict[str, Path]) -> None:
    model = assemble(
        parts,
        dtype=torch.bfloat16,
        attn="varlen",
        drop_path_rate=0.2,
        downsample_ratio=0.5,
        image_context_id=7,
    )
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert (model.attn, model.image_context_id) == ("varlen", 7)
    assert model.vision_model.encoder.layers[-1].drop_path1.drop_prob == pytest.approx(0.2)
    assert model.config.vision_config.drop_path_rate == 0.2


def test_another_ratio_needs_another_projector(parts: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=r"mismatched.*0\.bias"):
        assemble(parts, downsample_ratio=0.25)
    model = assemble(parts | {"mlp_file": None}, downsample_ratio=0.25)
    assert (model.config.tokens_per_tile, model.mlp1[1].weight.shape) == (1, (64, 512))
    record = dataclasses.replace(make_record((1,), tokens_per_tile=1))
    assert torch.isfinite(run_alone(model, record)).all()


@pytest.mark.parametrize("part", ["vision_folder", "llm_folder"])
def test_missing_configuration_or_weights(parts: dict[str, Path], part: str) -> None:
    for file in parts[part].glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ModelError, match="no weights") as caught:
        assemble(parts)
    assert str(parts[part]) in str(caught.value)
    (parts[part] / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        assemble(parts)


def test_weights_that_do_not_fit_their_configuration(parts: dict[str, Path]) -> None:
    file = parts["vision_folder"] / "model.safetensors"
    weights = load_file(file)
    del weights["encoder.layers.1.ls1"]
    save_file(weights, file)
    with pytest.raises(ModelError, match=r"1 missing weight\(s\), e\.g\. encoder\.layers\.1\.ls1") as caught:
        assemble(parts)
    assert str(parts["vision_folder"]) in str(caught.value)


def test_a_projector_of_another_width(parts: dict[str, Path], tmp_path: Path) -> None:
    torch.save(torch.nn.Sequential(torch.nn.LayerNorm(8)).state_dict(), tmp_path / "other.bin")
    with pytest.raises(ModelError, match="4 missing") as caught:
        assemble(parts | {"mlp_file": tmp_path / "other.bin"})
    assert "mismatched" in str(caught.value) and str(tmp_path / "other.bin") in str(caught.value)
