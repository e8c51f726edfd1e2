"""Merging: the numbers stay, nothing else is touched, and a failure leaves nothing behind."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import assert_within_rounding, terms_of
from model.conftest import (
    CONTEXT,
    load,
    make_model,
    make_record,
    run_alone,
    save_trained_adapter,
    save_wrapped,
)
from safetensors.torch import load_file, save_file
from transformers import InternVLConfig, InternVLForConditionalGeneration

from internvl_chat.convert import merge as merging
from internvl_chat.convert.export import export_hf
from internvl_chat.convert.merge import MergeResult, merge
from internvl_chat.model.io.adapter import BaseModel, save_adapter
from internvl_chat.model.io.derived import STAMP, making
from internvl_chat.model.io.hf_format import to_hf_config, to_hf_weights
from internvl_chat.model.io.weights import read_weights, weights_digest, write_weights
from internvl_chat.model.lora.injection import add_lora, lora_layers
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel
from internvl_chat.train.freeze import set_trainable
from internvl_chat.utils.errors import ModelError, UsageError

RECORD = make_record((2, 1))
LLM_LAYERS, VISION_LAYERS = 2 * 7, 2 * 4


def logits(model: InternVLChatModel) -> torch.Tensor:
    return run_alone(model, RECORD)


def assert_same_logits(found: InternVLChatModel, expected: InternVLChatModel) -> None:
    """Equal but for rounding; W + 2 B A adds the ranks before the product with the input, not after it."""
    assert_within_rounding(logits(found), logits(expected), terms_of(expected))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def assert_plain(folder: Path) -> None:
    """A merged folder is a whole model of the reference's format, without a trace of adapters."""
    assert load_file(folder / "model.safetensors").keys() == make_model().state_dict().keys()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert (config["use_llm_lora"], config["use_backbone_lora"]) == (0, 0)
    assert config["model_type"] == "internvl_chat"
    assert lora_layers(load(folder)) == {}
    assert not (folder / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("parts", "layers"),
    [
        ({"llm_rank": 4}, LLM_LAYERS),
        ({"vision_rank": 3}, VISION_LAYERS),
        ({"llm_rank": 4, "vision_rank": 2}, LLM_LAYERS + VISION_LAYERS),
        ({"mlp": True}, LLM_LAYERS),
        ({"mlp": True, "head": True}, LLM_LAYERS),
    ],
)
def test_our_adapters(folder: Path, tmp_path: Path, parts: dict, layers: int) -> None:
    model = save_trained_adapter(folder, tmp_path / "adapter", **parts)
    before = contents(folder), contents(tmp_path / "adapter")
    result = merge(tmp_path / "adapter", tmp_path / "merged")
    assert result == MergeResult(tmp_path / "merged", layers, already_merged=False)
    assert_plain(tmp_path / "merged")
    assert_same_logits(load(tmp_path / "merged"), model)
    assert (logits(model) - logits(load(folder))).abs().max() > 0.05
    assert (contents(folder), contents(tmp_path / "adapter")) == before


@pytest.mark.parametrize(
    ("ranks", "layers"),
    [
        ({"llm_rank": 4}, LLM_LAYERS),
        ({"vision_rank": 3}, VISION_LAYERS),
        ({"llm_rank": 4, "vision_rank": 2}, LLM_LAYERS + VISION_LAYERS),
    ],
)
def test_a_wrapped_checkpoint_of_the_reference(tmp_path: Path, ranks: dict, layers: int) -> None:
    source = tmp_path / "wrapped"
    model = save_wrapped(source, **ranks)
    before = contents(source)
    assert merge(source, tmp_path / "merged").merged_layers == layers
    assert_plain(tmp_path / "merged")
    assert_same_logits(load(tmp_path / "merged"), model)
    assert contents(source) == before


def test_adapters_over_a_wrapped_base(tmp_path: Path) -> None:
    base = tmp_path / "wrapped"
    save_wrapped(base)
    model = load(base)
    set_trainable(model, freeze_backbone=True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(0.5)
    save_adapter(model, tmp_path / "adapter", BaseModel(str(base), weights_digest(base)))
    assert merge(tmp_path / "adapter", tmp_path / "merged").merged_layers == LLM_LAYERS
    assert_plain(tmp_path / "merged")
    assert_same_logits(load(tmp_path / "merged"), model.eval())


def test_adapters_over_a_base_in_transformers_format(tmp_path: Path) -> None:
    base, model = tmp_path / "hf", make_model()
    other = InternVLForConditionalGeneration(InternVLConfig(**to_hf_config(model.config, CONTEXT)))
    own = {name: lambda t=tensor: t for name, tensor in model.state_dict().items()}
    other.load_state_dict({name: read() for name, read in to_hf_weights(own).items()})
    other.save_pretrained(str(base))
    trained = save_trained_adapter(base, tmp_path / "adapter", mlp=True, llm_rank=4, vision_rank=2)
    assert merge(tmp_path / "adapter", tmp_path / "merged").merged_layers == LLM_LAYERS + VISION_LAYERS
    assert_plain(tmp_path / "merged")
    assert_same_logits(load(tmp_path / "merged"), trained)


def test_a_folded_weight_by_hand(folder: Path, tmp_path: Path) -> None:
    save_trained_adapter(folder, tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged")
    layer = "language_model.model.layers.1.self_attn.k_proj"
    base, merged = load_file(folder / "model.safetensors"), load_file(tmp_path / "merged/model.safetensors")
    adapter = load_file(tmp_path / "adapter/adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.{layer}.lora_{letter}.weight"].double() for letter in "AB")
    expected = base[f"{layer}.weight"].double() + 2 * b @ a
    assert_within_rounding(merged[f"{layer}.weight"], expected, terms=1 + len(a))
    assert torch.equal(merged[f"{layer}.bias"], base[f"{layer}.bias"])
    assert torch.equal(merged["language_model.lm_head.weight"], base["language_model.lm_head.weight"])


def test_a_bfloat16_base_stays_bfloat16_and_is_rounded_once(folder: Path, tmp_path: Path) -> None:
    half = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(half, folder / "model.safetensors")
    save_trained_adapter(folder, tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged")
    merged = load_file(tmp_path / "merged/model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    layer = "language_model.model.layers.0.mlp.down_proj"
    adapter = load_file(tmp_path / "adapter/adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.{layer}.lora_{letter}.weight"] for letter in "AB")
    expected = (half[f"{layer}.weight"].float() + 2 * b @ a).bfloat16()
    assert torch.equal(merged[f"{layer}.weight"], expected)


@pytest.mark.parametrize("kind", ["adapter", "wrapped", "plain"])
def test_merging_again_does_nothing(folder: Path, tmp_path: Path, kind: str) -> None:
    sources = {"adapter": tmp_path / "adapter", "wrapped": tmp_path / "wrapped", "plain": folder}
    if kind == "adapter":
        save_trained_adapter(folder, tmp_path / "adapter")
    elif kind == "wrapped":
        save_wrapped(tmp_path / "wrapped")
    target = tmp_path / "merged"
    merge(sources[kind], target)
    before = contents(target)
    times = {file.name: file.stat().st_mtime_ns for file in target.iterdir()}
    assert merge(sources[kind], target) == MergeResult(target, 0, already_merged=True)
    assert contents(target) == before
    assert {file.name: file.stat().st_mtime_ns for file in target.iterdir()} == times


def test_a_model_without_adapters_is_copied_and_into_itself_left_alone(folder: Path, tmp_path: Path) -> None:
    assert merge(folder, tmp_path / "copy") == MergeResult(tmp_path / "copy", 0, already_merged=False)
    assert torch.equal(logits(load(tmp_path / "copy")), logits(load(folder)))
    before = contents(folder)
    assert merge(folder, folder) == MergeResult(folder, 0, already_merged=True)
    assert contents(folder) == before


def test_a_merged_model_can_be_merged_on(folder: Path, tmp_path: Path) -> None:
    save_trained_adapter(folder, tmp_path / "first")
    merge(tmp_path / "first", tmp_path / "once")
    model = save_trained_adapter(tmp_path / "once", tmp_path / "second", seed=7)
    merge(tmp_path / "second", tmp_path / "twice")
    assert_same_logits(load(tmp_path / "twice"), model)


@pytest.mark.parametrize("kind", ["adapter", "wrapped"])
def test_a_source_with_adapters_is_never_overwritten(folder: Path, tmp_path: Path, kind: str) -> None:
    source = tmp_path / kind
    if kind == "adapter":
        save_trained_adapter(folder, source)
    else:
        save_wrapped(source)
    before = contents(source)
    with pytest.raises(ModelError, match="choose another folder"):
        merge(source, source)
    assert contents(source) == before


def test_a_target_with_other_content_is_refused(folder: Path, tmp_path: Path) -> None:
    save_trained_adapter(folder, tmp_path / "adapter")
    target = tmp_path / "merged"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    with pytest.raises(ModelError, match="choose another folder") as caught:
        merge(tmp_path / "adapter", target)
    assert str(target) in str(caught.value)
    assert contents(target) == {"thesis.txt": b"years of work"}


def test_the_merge_of_another_adapter_is_refused(folder: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        save_trained_adapter(folder, tmp_path / f"adapter-{seed}", seed=seed)
    merge(tmp_path / "adapter-1", tmp_path / "merged")
    before = contents(tmp_path / "merged")
    with pytest.raises(ModelError, match="not an earlier merge"):
        merge(tmp_path / "adapter-2", tmp_path / "merged")
    assert contents(tmp_path / "merged") == before


@pytest.mark.parametrize("form", ["empty", "nested", "relative", "text"])
def test_forms_of_the_target(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.chdir(tmp_path)
    model = save_trained_adapter(folder, tmp_path / "adapter")
    if form == "empty":
        (tmp_path / "empty").mkdir()
    target = {
        "empty": tmp_path / "empty",
        "nested": tmp_path / "new/folders/merged",
        "relative": Path("merged"),
        "text": str(tmp_path / "merged"),
    }[form]
    result = merge(str(tmp_path / "adapter"), target)
    assert_same_logits(load(result.folder), model)


@pytest.mark.parametrize("exists", [False, True])
def test_a_failure_leaves_nothing_behind(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    save_trained_adapter(folder, tmp_path / "adapter")
    target = tmp_path / "out/merged"
    target.parent.mkdir()
    if exists:
        target.mkdir()

    def fail(weights, target: Path, **_) -> None:
        (target / "model-00001-of-00002.safetensors").write_bytes(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(merging, "write_weights", fail)
        with pytest.raises(OSError, match="no space left"):
            merge(tmp_path / "adapter", target)
    assert list(target.parent.rglob("*")) == ([target] if exists else [])
    assert merge(tmp_path / "adapter", target).merged_layers == LLM_LAYERS


def test_a_target_that_cannot_be_made_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    target = tmp_path / "file/merged"
    with pytest.raises(ModelError, match=re.escape(f"{target}: the folder cannot be made: Not a directory")):
        merge(folder, target)


@pytest.mark.parametrize("work", [merge, export_hf])
def test_a_target_within_its_source_is_refused(folder: Path, work: Callable) -> None:
    before = sorted(folder.rglob("*"))
    with pytest.raises(ModelError, match=r"is within .*, which is read"):
        work(folder, folder / "sub/model")
    assert sorted(folder.rglob("*")) == before


def test_what_a_killed_merge_left_is_no_obstacle(folder: Path, tmp_path: Path) -> None:
    save_trained_adapter(folder, tmp_path / "adapter")
    (tmp_path / "out/.merged.partial").mkdir(parents=True)
    (tmp_path / "out/.merged.partial/part-00001.safetensors").write_bytes(b"half")
    merge(tmp_path / "adapter", tmp_path / "out/merged")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["merged"]
    assert_plain(tmp_path / "out/merged")


def test_two_merges_into_one_target_do_not_meet(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that starts while another is at work is refused; one that was overtaken leaves the result alone."""
    source, target = tmp_path / "adapter", tmp_path / "merged"
    save_trained_adapter(folder, source)
    write = merging.write_weights

    def refused(*args, **kwargs) -> None:
        with pytest.raises(UsageError, match=rf"another run \(process {os.getpid()}\) is writing"):
            merge(source, target)
        return write(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(merging, "write_weights", refused)
        merge(source, target)
    assert_plain(target)
    before = contents(target)

    with pytest.raises(ModelError, match="another process has made it"), making(target, {}, checked=False):
        pytest.fail("the target is there already")
    assert contents(target) == before
    assert not list(tmp_path.glob(".*"))


def test_the_base_must_be_the_right_one_and_may_have_moved(folder: Path, tmp_path: Path) -> None:
    model = save_trained_adapter(folder, tmp_path / "adapter")
    folder.rename(tmp_path / "moved")
    with pytest.raises(ModelError, match="base is missing"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    merge(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "moved")
    assert_same_logits(load(tmp_path / "merged"), model)

    weights = load_file(tmp_path / "moved/model.safetensors")
    weights["mlp1.1.bias"][0] += 1
    save_file(weights, tmp_path / "moved/model.safetensors")
    with pytest.raises(ModelError, match="not the base"):
        merge(tmp_path / "adapter", tmp_path / "again", base=tmp_path / "moved")
    assert not (tmp_path / "again").exists()


def test_companions_come_from_base_and_adapter_and_the_adapter_s_win(folder: Path, tmp_path: Path) -> None:
    save_trained_adapter(folder, tmp_path / "adapter")
    for place, names in {
        folder: ("vocab.json", "preprocessing.json", "modeling_internvl_chat.py"),
        tmp_path / "adapter": ("preprocessing.json", "tokenizer.json"),
    }.items():
        for name in names:
            (place / name).write_text(f"{place.name}: {name}")
    merge(tmp_path / "adapter", tmp_path / "merged")
    found = {
        name: text.decode()
        for name, text in contents(tmp_path / "merged").items()
        if name not in ("model.safetensors", "config.json", STAMP)
    }
    assert found == {
        "vocab.json": "model: vocab.json",
        "modeling_internvl_chat.py": "model: modeling_internvl_chat.py",
        "preprocessing.json": "adapter: preprocessing.json",
        "tokenizer.json": "adapter: tokenizer.json",
    }


def test_the_options_that_the_adapter_was_trained_with_are_kept(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    model.config.select_layer, model.config.max_dynamic_patch = -2, 3
    add_lora(model, llm_rank=4)
    set_trainable(model, freeze_mlp=True, freeze_backbone=True)
    save_adapter(model, tmp_path / "adapter", BaseModel(str(folder), weights_digest(folder)))
    merge(tmp_path / "adapter", tmp_path / "merged")
    merged = load(tmp_path / "merged")
    assert (merged.config.select_layer, merged.config.max_dynamic_patch) == (-2, 3)
    assert_same_logits(merged, model.eval())


def test_adapters_of_layers_that_the_base_lacks_are_refused(folder: Path, tmp_path: Path) -> None:
    save_trained_adapter(folder, tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    weights = load_file(file)
    weights |= {name.replace("layers.1.", "layers.9."): tensor.clone() for name, tensor in weights.items()}
    save_file(weights, file)
    with pytest.raises(ModelError, match="lacks 7 of the adapted layers"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_unknown_keys_of_the_base_s_configuration_are_kept(folder: Path, tmp_path: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    raw["auto_map"] = {"AutoModel": "modeling_internvl_chat.InternVLChatModel"}
    (folder / "config.json").write_text(json.dumps(raw))
    save_trained_adapter(folder, tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged")
    assert json.loads((tmp_path / "merged/config.json").read_text()) == raw


def test_a_sharded_base_gives_a_sharded_result(folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "sharded"
    base.mkdir()
    write_weights(read_weights(folder), base, max_shard_bytes=60_000)
    (base / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert len(list(base.glob("*.safetensors"))) > 3
    model = save_trained_adapter(base, tmp_path / "adapter", mlp=True)
    merge(tmp_path / "adapter", tmp_path / "merged", max_shard_bytes=60_000)
    shards = sorted((tmp_path / "merged").glob("*.safetensors"))
    assert len(shards) > 3 and max(file.stat().st_size for file in shards) < 100_000
    assert_same_logits(load(tmp_path / "merged"), model)


def test_a_check_that_fails_undoes_the_merge(folder: Path, tmp_path: Path) -> None:
    save_trained_adapter(folder, tmp_path / "adapter")
    seen: list[Path] = []

    def refuse(result: Path) -> None:
        assert_plain(result)
        seen.append(result)
        raise ModelError("differs")

    with pytest.raises(ModelError, match="differs"):
        merge(tmp_path / "adapter", tmp_path / "out/merged", check=refuse)
    assert len(seen) == 1 and not list((tmp_path / "out").iterdir())
    merge(tmp_path / "adapter", tmp_path / "out/merged", check=seen.append)
    merge(tmp_path / "adapter", tmp_path / "out/merged", check=seen.append)
    assert len(seen) == 2, "a merge that is there already is not checked again"


def test_a_configuration_that_need_not_change_is_copied_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    raw.pop("min_dynamic_patch")
    text = json.dumps(raw, indent=7)
    (folder / "config.json").write_text(text)
    merge(folder, tmp_path / "copy")
    assert (tmp_path / "copy/config.json").read_text() == text


def test_a_result_is_looked_at_before_it_is_called_made(folder: Path, tmp_path: Path) -> None:
    """A file that is gone, settings of the source that have changed, a check that was left out."""
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(folder, source)
    merge(source, target)
    with pytest.raises(ModelError, match="was made without being compared with its source"):
        merge(source, target, check=lambda _: None)
    shutil.rmtree(target)
    merge(source, target, check=lambda _: None)
    assert merge(source, target).already_merged
    weights = target / "model.safetensors"
    weights.rename(target / "elsewhere")
    with pytest.raises(ModelError, match=r"model\.safetensors is missing or has changed"):
        merge(source, target)
    (target / "elsewhere").rename(weights)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"max_dynamic_patch": 3}))
    with pytest.raises(ModelError, match="is not an earlier merge of the source as it is now"):
        merge(source, target)
