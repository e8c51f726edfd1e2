"""Parity detects every kind of difference and tolerates rounding."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from integration.test_export import save_with_tokenizer
from model.conftest import make_model, save_trained_adapter
from safetensors.torch import load_file, save_file

from internvl_chat.cli import main as m3llm
from internvl_chat.convert import parity
from internvl_chat.convert.export import export_hf
from internvl_chat.convert.merge import merge
from internvl_chat.convert.parity import (
    Difference,
    Tolerances,
    check_same,
    compare,
    comparison_dtype,
    faults,
    rounding_tolerances,
    synthetic_examples,
)
from internvl_chat.convert.parity_runners import OwnRunner
from internvl_chat.data.sources.meta import load_meta
from internvl_chat.model.configuration import InternVLChatConfig
from internvl_chat.model.tiny import TinyShape
from internvl_chat.utils.errors import ModelError

CPU = torch.device("cpu")
SAME = Difference("qa", 0, "r0", True, True, 0.0, 0.0, 2.0, True, ("a", "a"))


@pytest.fixture(scope="module")
def exported(tiny_model, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("export") / "hf"
    export_hf(tiny_model, target)
    return target


@pytest.fixture
def changed(exported, tmp_path) -> Path:
    """Copy of the exported model that the test modifies."""
    return Path(shutil.copytree(exported, tmp_path / "changed"))


def edit(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def run(*argv, capsys) -> tuple[int, list[dict]]:
    code = m3llm(["parity", *map(str, argv), "--device", "cpu", "--json"])
    return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_two_formats_of_one_model(tiny_model, exported, sample_data, capsys) -> None:
    meta = sample_data / "held_out.json"
    code, rows = run(tiny_model, exported, "--meta", meta, "--limit", 1, capsys=capsys)
    *records, summary = rows
    assert code == 0 and summary["same"] and summary["records"] == len(records) == 6
    assert [row["dataset"] for row in records] == [spec.name for spec in load_meta(meta, "/")]
    assert all(row["same_ids"] and row["same_tiles"] and row["same_answer"] for row in records)
    assert max(row["pixels"] for row in records) <= 1e-6
    tolerance = rounding_tolerances(tiny_model, exported, torch.float32).logits
    assert all(row["logits"] <= tolerance * row["largest_logit"] for row in records)


def test_different_head_is_detected(tiny_model, changed, capsys) -> None:
    weights = load_file(changed / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"] + 0.01
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    code, rows = run(tiny_model, changed, capsys=capsys)
    assert code == 1 and rows[-1]["faults"][0].startswith("the logits differ by up to")
    # The same difference passes with a higher tolerance.
    flags = ("--logit_tolerance", 100, "--same_answers", 0)
    assert run(tiny_model, changed, *flags, capsys=capsys)[0] == 0


def test_different_tile_limit_is_detected(tiny_model, changed, capsys) -> None:
    edit(changed / "preprocessor_config.json", max_patches=2)
    code, rows = run(tiny_model, changed, capsys=capsys)
    assert code == 1
    assert any("tiles" in fault for fault in rows[-1]["faults"])
    assert any("token ids" in fault for fault in rows[-1]["faults"])
    changed_rows = [row for row in rows[:-1] if not row["same_tiles"]]
    assert changed_rows and all(row["pixels"] is None and row["logits"] is None for row in changed_rows)


def test_different_pixel_statistics_are_detected(tiny_model, changed, capsys) -> None:
    edit(changed / "preprocessor_config.json", image_mean=[0.5, 0.5, 0.5])
    code, rows = run(tiny_model, changed, capsys=capsys)
    assert code == 1 and any("pixels differ" in fault for fault in rows[-1]["faults"])
    assert rows[0]["dataset"] == "qa-puretext" and rows[0]["pixels"] == 0.0  # no image, no difference


def test_different_system_text_is_detected(tiny_model, changed, capsys) -> None:
    file = changed / "chat_template.jinja"
    file.write_text(file.read_text().replace("InternVL", "Intern"))
    code, rows = run(tiny_model, changed, capsys=capsys)
    assert code == 1 and "token ids differ on 6 of 6 records" in rows[-1]["faults"][0]


def test_table_of_differences(tiny_model, changed, capsys) -> None:
    edit(changed / "preprocessor_config.json", image_mean=[0.5, 0.5, 0.5])
    assert m3llm(["parity", str(tiny_model), str(changed), "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "same tokens" in out and "differs: the pixels differ by up to" in out


def test_a_folder_that_transformers_cannot_load_is_reported(tiny_model, changed, capsys) -> None:
    (changed / "model.safetensors").unlink()
    assert m3llm(["parity", str(tiny_model), str(changed), "--device", "cpu"]) == 1
    assert str(changed) in capsys.readouterr().err


def test_faults_by_hand() -> None:
    allowed = Tolerances(logits=1e-4)
    assert faults([SAME, SAME], allowed) == []
    assert faults([replace(SAME, logits=2e-4, pixels=1e-5)], allowed) == []
    assert faults([replace(SAME, logits=2.2e-4)], allowed) == [
        "the logits differ by up to 0.00011 of the largest logit, more than 0.0001"
    ]
    assert "logits have different shapes" in faults([replace(SAME, logits=None)], allowed)[0]
    assert "pixels have different shapes" in faults([replace(SAME, pixels=None)], allowed)[0]
    half = [SAME, replace(SAME, same_answer=False)]
    assert faults(half, replace(allowed, same_answers=0.5)) == []
    assert "50% of the greedy answers" in faults(half, replace(allowed, same_answers=0.6))[0]


def test_nan_is_a_difference() -> None:
    a = torch.zeros(2, 2)
    assert parity._largest(a, torch.full((2, 2), torch.nan)) == torch.inf
    assert parity._largest(a[:0], a[:0]) == 0.0
    for logits, largest in ((torch.inf, 1.0), (torch.inf, torch.inf), (0.0, torch.inf)):
        assert replace(SAME, logits=logits, largest_logit=largest).relative_logits == torch.inf
    assert replace(SAME, largest_logit=0.0).relative_logits == 0.0


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_text_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", text_config={**config["text_config"], **values})


def tie_head(folder: Path) -> None:
    edit(folder / "config.json", tie_word_embeddings=True)
    change_text_config(folder, tie_word_embeddings=True)
    change_weights(folder, lambda weights: weights.pop("lm_head.weight"))


def permute_qkv(folder: Path) -> None:
    """Swap queries and keys in the first layer of the vision tower."""

    def change(weights: dict[str, torch.Tensor]) -> None:
        names = [f"model.vision_tower.encoder.layer.0.attention.{x}_proj.weight" for x in "qk"]
        weights.update(zip(names, [weights[name] for name in reversed(names)], strict=True))

    change_weights(folder, change)


ERRORS = {
    "tied head": tie_head,
    "permuted qkv": permute_qkv,
    "rope theta": lambda folder: change_text_config(
        folder, rope_parameters={"rope_type": "default", "rope_theta": 1e4}
    ),
    "norm epsilon": lambda folder: change_text_config(folder, rms_norm_eps=1e-5),
}


@pytest.mark.parametrize("error", ERRORS)
def test_real_errors_are_detected(tiny_model, changed, error) -> None:
    """Each error is at least ten times the rounding tolerance."""
    ERRORS[error](changed)
    allowed = rounding_tolerances(tiny_model, changed, torch.float32)
    examples = synthetic_examples(tiny_model)
    found = list(compare(tiny_model, changed, examples, device=CPU, dtype=torch.float32))
    assert max(d.relative_logits for d in found) > 10 * allowed.logits
    with pytest.raises(ModelError, match="logits differ"):
        check_same(tiny_model, changed, device=CPU)


SIZES = {
    "small": TinyShape(56, vision_width=32, vision_layers=2, vision_heads=2, width=64, layers=2, heads=4),
    "wide": TinyShape(56, vision_width=192, vision_layers=2, vision_heads=4, width=384, layers=2, heads=8),
    "deep": TinyShape(56, vision_width=32, vision_layers=12, vision_heads=2, width=64, layers=24, heads=4),
}


@pytest.mark.parametrize("size", SIZES)
def test_rounding_is_tolerated(tiny_model, tmp_path, size) -> None:
    """Twice the error relative to float64 is within the tolerance, for small and large logits."""
    model = make_model(SIZES[size])
    save_with_tokenizer(model, tiny_model, tmp_path / "model")
    largest = []
    for large in (False, True):
        if large:
            change_weights(
                tmp_path / "model", lambda weights: weights["language_model.lm_head.weight"].mul_(200)
            )
        single, double = (OwnRunner(tmp_path / "model", CPU, t, None) for t in (torch.float32, torch.float64))
        allowed = rounding_tolerances(tmp_path / "model", tmp_path / "model", torch.float32)
        for example in synthetic_examples(tmp_path / "model"):
            a, b = (runner.run(example, 1).logits for runner in (single, double))
            largest.append(b.abs().max().item())
            assert 2 * (a - b).abs().max() <= allowed.logits * largest[-1]
    assert min(largest) < 10 and max(largest) > 200


def test_tolerances_of_the_real_model() -> None:
    config = InternVLChatConfig.from_dict(
        {
            "model_type": "internvl_chat",
            "vision_config": {
                "hidden_size": 1024,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "intermediate_size": 4096,
                "image_size": 448,
            },
            "llm_config": {
                "model_type": "qwen2",
                "hidden_size": 3584,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
                "intermediate_size": 18944,
            },
        }
    )
    summed, results = parity._roundings(config)
    assert torch.finfo(torch.float32).eps * summed**0.5 == pytest.approx(1.2e-4, rel=0.02)
    assert torch.finfo(torch.bfloat16).eps * results**0.5 == pytest.approx(0.16, rel=0.02)


def test_synthetic_records_are_of_every_kind(tiny_model) -> None:
    examples = synthetic_examples(tiny_model)
    assert {len(example.images) for example in examples} >= {0, 1, 2}
    assert all(example.record.messages[-1].role == "assistant" for example in examples)
    assert [e.record.messages for e in examples] == [
        e.record.messages for e in synthetic_examples(tiny_model)
    ]


def test_synthetic_records_fit_the_checkpoint(tiny_model, tmp_path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    runner = OwnRunner(model, CPU, torch.float32, None)
    lengths = sorted(len(runner.run(e, 1).input_ids) for e in synthetic_examples(model))
    edit(model / "preprocessing.json", max_seq_length=lengths[2])
    assert len(synthetic_examples(model)) == 3
    edit(model / "preprocessing.json", max_seq_length=3)
    with pytest.raises(Exception, match="skip the check"):
        synthetic_examples(model)


def test_tolerances_of_a_merge(tiny_model, tmp_path) -> None:
    half = shutil.copytree(tiny_model, tmp_path / "half")
    weights = {n: t.bfloat16() for n, t in load_file(tiny_model / "model.safetensors").items()}
    save_file(weights, half / "model.safetensors", metadata={"format": "pt"})
    exact = rounding_tolerances(tiny_model, half, torch.float32)
    rounded = rounding_tolerances(tiny_model, half, torch.bfloat16)
    assert exact.same_answers == 1 and rounded.same_answers == 0
    for base, allowed in ((tiny_model, exact), (half, rounded)):
        adapter, merged = tmp_path / f"{base.name}-lora", tmp_path / f"{base.name}-merged"
        save_trained_adapter(base, adapter)
        for name in ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(base / name, adapter)
        merge(adapter, merged)
        assert rounding_tolerances(adapter, merged, torch.float32) == allowed
        differences = check_same(adapter, merged, device=CPU)
        assert 0 < max(d.relative_logits for d in differences) < allowed.logits / 2
        with pytest.raises(ModelError, match="logits differ"):
            check_same(adapter, base, device=CPU)


def test_bfloat16_if_memory_is_short(tiny_model, monkeypatch) -> None:
    import psutil

    assert comparison_dtype((tiny_model, tiny_model), CPU, (None, None)) == torch.float32
    short = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: short)
    assert comparison_dtype((tiny_model, tiny_model), CPU, (None, None)) == torch.bfloat16


PARTS_ONLY = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.content is string -%}{{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {{- '<IMG_CONTEXT>\\n' if part.type == 'image' else part.text -}}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def test_template_that_requires_image_parts(exported, changed, capsys) -> None:
    """transformers' own conversion script writes such templates; without our system prompt, tokens differ."""
    (changed / "chat_template.jinja").write_text(PARTS_ONLY)
    code, rows = run(exported, changed, capsys=capsys)
    *records, summary = rows
    assert code == 1 and not summary["same"] and summary["records"] == 6
    assert all(row["same_tiles"] and not row["same_ids"] for row in records)
    assert max(row["pixels"] for row in records) == 0
