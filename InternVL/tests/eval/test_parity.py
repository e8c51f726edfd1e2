"""Parity: every kind of difference is found, and nothing is found where there is none."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model.conftest import save_trained_adapter
from safetensors.torch import load_file, save_file

from internvl_chat.cli import main as m3llm
from internvl_chat.data.meta import load_meta
from internvl_chat.eval import parity
from internvl_chat.eval.parity import (
    Difference,
    Tolerances,
    check_same,
    comparison_dtype,
    expected_tolerances,
    faults,
    made_up_examples,
)
from internvl_chat.eval.parity_sides import OwnSide
from internvl_chat.inference.export import export_hf
from internvl_chat.model.merge import merge
from internvl_chat.utils.errors import ModelError

CPU = torch.device("cpu")
SAME = Difference("qa", 0, "r0", True, True, 0.0, 0.0, True, ("a", "a"))


@pytest.fixture(scope="module")
def exported(tiny_model, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("export") / "hf"
    export_hf(tiny_model, target)
    return target


@pytest.fixture
def changed(exported, tmp_path) -> Path:
    """A copy of the exported model that may be spoilt."""
    return Path(shutil.copytree(exported, tmp_path / "changed"))


def edit(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def run(*argv, capsys) -> tuple[int, list[dict]]:
    code = m3llm(["parity", *map(str, argv), "--device", "cpu", "--json"])
    return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_two_formats_on_real_like_records(tiny_model, exported, sample_data, capsys) -> None:
    meta = sample_data / "held_out.json"
    code, rows = run(tiny_model, exported, "--meta", meta, "--limit", 1, capsys=capsys)
    *records, summary = rows
    assert code == 0 and summary["same"] and summary["records"] == len(records) == 6
    assert [row["dataset"] for row in records] == [spec.name for spec in load_meta(meta, "/")]
    assert all(row["same_ids"] and row["same_tiles"] and row["same_answer"] for row in records)
    assert max(row["pixels"] for row in records) <= 1e-6
    assert max(row["logits"] for row in records) <= 1e-4


def test_another_head_is_found(tiny_model, changed, capsys) -> None:
    weights = load_file(changed / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"] + 0.01
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    code, rows = run(tiny_model, changed, capsys=capsys)
    assert code == 1 and rows[-1]["faults"][0].startswith("the logits differ by up to")
    # What is within a tolerance that is given passes.
    flags = ("--logit_tolerance", 100, "--same_answers", 0)
    assert run(tiny_model, changed, *flags, capsys=capsys)[0] == 0


def test_another_limit_of_tiles_is_found(tiny_model, changed, capsys) -> None:
    edit(changed / "preprocessor_config.json", max_patches=2)
    code, rows = run(tiny_model, changed, capsys=capsys)
    assert code == 1
    assert any("tiles" in fault for fault in rows[-1]["faults"])
    assert any("token ids" in fault for fault in rows[-1]["faults"])
    spoilt = [row for row in rows[:-1] if not row["same_tiles"]]
    assert spoilt and all(row["pixels"] is None and row["logits"] is None for row in spoilt)


def test_other_pixel_statistics_are_found(tiny_model, changed, capsys) -> None:
    edit(changed / "preprocessor_config.json", image_mean=[0.5, 0.5, 0.5])
    code, rows = run(tiny_model, changed, capsys=capsys)
    assert code == 1 and any("pixels differ" in fault for fault in rows[-1]["faults"])
    assert rows[0]["dataset"] == "qa-puretext" and rows[0]["pixels"] == 0.0  # no image, no difference


def test_another_system_text_is_found(tiny_model, changed, capsys) -> None:
    file = changed / "chat_template.jinja"
    file.write_text(file.read_text().replace("InternVL", "Intern"))
    code, rows = run(tiny_model, changed, capsys=capsys)
    assert code == 1 and "token ids of 6 of 6 records differ" in rows[-1]["faults"][0]


def test_the_table_names_what_differs(tiny_model, changed, capsys) -> None:
    edit(changed / "preprocessor_config.json", image_mean=[0.5, 0.5, 0.5])
    assert m3llm(["parity", str(tiny_model), str(changed), "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "same tokens" in out and "differs: the pixels differ by up to" in out


def test_a_folder_that_transformers_cannot_load_is_told(tiny_model, changed, capsys) -> None:
    (changed / "model.safetensors").unlink()
    assert m3llm(["parity", str(tiny_model), str(changed), "--device", "cpu"]) == 1
    assert str(changed) in capsys.readouterr().err


def test_faults_by_hand() -> None:
    assert faults([SAME, SAME], Tolerances()) == []
    assert faults([replace(SAME, logits=1e-4, pixels=1e-5)], Tolerances()) == []
    assert faults([replace(SAME, logits=1.1e-4)], Tolerances()) == [
        "the logits differ by up to 0.00011, more than 0.0001"
    ]
    assert "logits are of another shape" in faults([replace(SAME, logits=None)], Tolerances())[0]
    assert "pixels are of another shape" in faults([replace(SAME, pixels=None)], Tolerances())[0]
    half = [SAME, replace(SAME, same_answer=False)]
    assert faults(half, Tolerances(same_answers=0.5)) == []
    assert "50% of the greedy answers" in faults(half, Tolerances(same_answers=0.6))[0]


def test_what_is_no_number_is_a_difference() -> None:
    a = torch.zeros(2, 2)
    assert parity._largest(a, torch.full((2, 2), torch.nan)) == torch.inf
    assert parity._largest(a[:0], a[:0]) == 0.0


def test_made_up_records_are_of_every_kind(tiny_model) -> None:
    examples = made_up_examples(tiny_model)
    assert {len(example.images) for example in examples} >= {0, 1, 2}
    assert all(example.record.turns[-1].role == "assistant" for example in examples)
    assert [e.record.turns for e in examples] == [e.record.turns for e in made_up_examples(tiny_model)]


def test_made_up_records_fit_the_checkpoint(tiny_model, tmp_path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    side = OwnSide(model, CPU, torch.float32, None)
    lengths = sorted(len(side.trace(e, 1).input_ids) for e in made_up_examples(model))
    edit(model / "preprocessing.json", max_seq_length=lengths[2])
    assert len(made_up_examples(model)) == 3
    edit(model / "preprocessing.json", max_seq_length=3)
    with pytest.raises(Exception, match="leave the check out"):
        made_up_examples(model)


def test_what_is_expected_of_a_merge(tiny_model, tmp_path) -> None:
    half = shutil.copytree(tiny_model, tmp_path / "half")
    weights = {n: t.bfloat16() for n, t in load_file(tiny_model / "model.safetensors").items()}
    save_file(weights, half / "model.safetensors", metadata={"format": "pt"})
    for base, tolerance in ((tiny_model, 1e-3), (half, 0.5)):
        adapter, merged = tmp_path / f"{base.name}-lora", tmp_path / f"{base.name}-merged"
        save_trained_adapter(base, adapter)
        for name in ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(base / name, adapter)
        merge(adapter, merged)
        assert expected_tolerances(adapter, merged, torch.float32).logits == tolerance
        differences = check_same(adapter, merged, device=CPU)
        assert max(d.logits for d in differences) < tolerance / 2
        with pytest.raises(ModelError, match="logits differ"):
            check_same(adapter, base, device=CPU)
    assert expected_tolerances(tiny_model, half, torch.float32) == Tolerances()


def test_bfloat16_is_taken_where_memory_is_short(tiny_model, monkeypatch) -> None:
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


def test_a_template_that_knows_images_only_as_parts(exported, changed, capsys) -> None:
    """As of models that transformers' own script has converted; without our system text the tokens differ."""
    (changed / "chat_template.jinja").write_text(PARTS_ONLY)
    code, rows = run(exported, changed, capsys=capsys)
    *records, summary = rows
    assert code == 1 and not summary["same"] and summary["records"] == 6
    assert all(row["same_tiles"] and not row["same_ids"] for row in records)
    assert max(row["pixels"] for row in records) == 0
