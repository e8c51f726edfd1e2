"""Export compared with transformers' classes, and conversion back, on real records and many model shapes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from model.conftest import make_model
from parity.test_transformers import MODELS
from published_models import ARCHITECTURES
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from internvl_chat.cli import main as m3llm
from internvl_chat.convert.export import export_hf
from internvl_chat.convert.merge import merge
from internvl_chat.convert.parity import check_same
from internvl_chat.data.encode.encoder import RecordEncoder
from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.data.encode.tiling import normalize_tiles
from internvl_chat.data.encode.tokenizer import decode_answer, image_context_id, load_tokenizer
from internvl_chat.data.record_set import RecordSet
from internvl_chat.data.sources.meta import DatasetSpec
from internvl_chat.inference.engine import Engine, Prompt
from internvl_chat.model.io.checkpoint import load_model, save_model
from internvl_chat.model.io.folders import read_auxiliary_files, read_config, write_files
from internvl_chat.utils.errors import ModelError

TASKS = ("boundingboxVQA", "compound_image", "extra", "multiple_subimage", "puretext", "single_subimage")
CPU = torch.device("cpu")


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder, except `made_from.json`."""
    return {
        file.name: file.read_bytes()
        for file in folder.iterdir()
        if file.is_file() and file.name != "made_from.json"
    }


def own_sets(shared: Path, folder: Path) -> list[RecordSet]:
    tokenizer, _ = load_tokenizer(folder)
    encoder = RecordEncoder(tokenizer, Preprocessing.from_folder(folder, read_config(folder)))
    root = shared / "pmc_mi"
    return [
        RecordSet(DatasetSpec(task, root / "images", root / f"jsonl/{task}.jsonl"), encoder) for task in TASKS
    ]


@pytest.fixture(scope="module")
def exported(shared, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("export") / "hf"
    export_hf(shared / "conformance/tiny", target)
    return target


@pytest.fixture(scope="module")
def transformers_parts(exported):
    processor = AutoProcessor.from_pretrained(exported)
    processor.image_processor = AutoImageProcessor.from_pretrained(exported, backend="pil")
    return processor, AutoModelForImageTextToText.from_pretrained(exported).eval()


@torch.inference_mode()
def test_processor_and_model_match_on_real_records(shared, transformers_parts) -> None:
    processor, theirs = transformers_parts
    source = shared / "conformance/tiny"
    tokenizer, _ = load_tokenizer(source)
    ours = load_model(source, image_context_id=image_context_id(tokenizer)).eval()
    numbers_of_images = set()
    for records in own_sets(shared, source):
        for index in records.first(3):
            record, sample = records.record(index), records.load(index)
            numbers_of_images.add(len(record.images))
            messages = [{"role": message.role, "content": message.content} for message in record.messages]
            inputs = processor(
                text=processor.apply_chat_template(messages),
                images=records.images(index, record) or None,
                images_kwargs={"max_patches": max(1, 12 // max(1, len(record.images)))},
                return_tensors="pt",
            )
            assert torch.equal(inputs["input_ids"][0], sample.encoded.input_ids)
            pixels = normalize_tiles(sample.tiles, "imagenet")
            if record.images:
                torch.testing.assert_close(inputs["pixel_values"], pixels, atol=1e-6, rtol=0)
            expected = theirs(**inputs, use_cache=False).logits
            found = ours(input_ids=sample.encoded.input_ids[None], pixel_values=pixels).logits
            assert expected.std() > 0.1
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert {0, 1, 2} <= numbers_of_images


def test_greedy_answers_match(shared, exported, transformers_parts) -> None:
    processor, theirs = transformers_parts
    engine = Engine.from_checkpoint(shared / "conformance/tiny", device="cpu")
    records = own_sets(shared, shared / "conformance/tiny")[3]
    for index in (0, 1):
        record = records.record(index)
        messages, images = record.messages[:1], records.images(index, record)
        [ours] = engine.answer([Prompt(messages, images)], max_new_tokens=12)
        text = processor.apply_chat_template(
            [{"role": "user", "content": messages[0].content}], add_generation_prompt=True
        )
        tiles = {"max_patches": max(1, 12 // len(images))}
        inputs = processor(text=text, images=images, images_kwargs=tiles, return_tensors="pt")
        # The stop token comes from the exported generation settings.
        ids = theirs.generate(**inputs, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
        assert decode_answer(processor.tokenizer, ids.tolist()) == ours


def test_chat_template_with_image_parts(shared, transformers_parts) -> None:
    processor, _ = transformers_parts
    images = sorted((shared / "pmc_mi/images").glob("*.jpg"))[:2]
    content = [{"type": "image", "path": str(path)} for path in images]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": "which ?"}]}]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    context = (inputs["input_ids"] == processor.image_token_id).sum()
    assert context == 4 * len(inputs["pixel_values"]) > 0


def test_torchvision_processor_makes_the_same_tiles(shared, exported) -> None:
    default = AutoProcessor.from_pretrained(exported).image_processor
    pillow = AutoImageProcessor.from_pretrained(exported, backend="pil")
    assert type(default) is not type(pillow)
    records = own_sets(shared, shared / "conformance/tiny")[1]
    [image] = records.images(0, records.record(0))
    a, b = (p(image, return_tensors="pt")["pixel_values"] for p in (default, pillow))
    assert a.shape == b.shape
    assert 0 < (a - b).abs().mean() < 0.02


def test_round_trip_is_byte_identical(shared, exported, tmp_path) -> None:
    source = shared / "conformance/tiny"
    merge(exported, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source)


def test_exported_folder_has_no_code_or_pickle(exported) -> None:
    suffixes = {file.suffix for file in exported.rglob("*") if file.is_file()}
    assert suffixes <= {".json", ".jinja", ".safetensors", ".txt"}
    assert "auto_map" not in json.loads((exported / "config.json").read_text())


def test_end_of_sequence_token(exported, shared) -> None:
    tokenizer, _ = load_tokenizer(shared / "conformance/tiny")
    settings = GenerationConfig.from_pretrained(exported)
    assert settings.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert settings.pad_token_id == tokenizer.pad_token_id


SHAPES = (
    *("84 pixels, deep vision, one head", "normalised queries and keys", "RMS norms alone"),
    *("last layer but one", "tied head", "Llama"),
    *ARCHITECTURES,
)


def save_with_tokenizer(model, tiny_model: Path, folder: Path) -> None:
    """Save a model with the tokenizer and the vocabulary size of the tiny model.

    As in InternVL3.5, a Qwen3 model has more embeddings than its tokenizer has tokens.
    """
    tokenizer, _ = load_tokenizer(tiny_model)
    size = len(tokenizer) + 7 * model.config.llm_config["model_type"].startswith("qwen3")
    model.language_model.resize_token_embeddings(size, mean_resizing=False)
    model.config.llm_config["vocab_size"] = size
    save_model(model, folder)
    write_files(read_auxiliary_files(tiny_model), folder)
    Preprocessing.from_model_config(model.config).save(folder)


@pytest.mark.parametrize("name", SHAPES)
def test_models_of_other_shapes(name, tiny_model, tmp_path) -> None:
    save_with_tokenizer(MODELS[name](), tiny_model, tmp_path / "model")
    differences = []

    def check(result: Path) -> None:
        differences.extend(check_same(tmp_path / "model", result, device=CPU))

    export_hf(tmp_path / "model", tmp_path / "hf", check=check, max_shard_bytes=100_000)
    assert len(differences) == 6 and all(d.relative_logits < 1e-4 for d in differences)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    merge(tmp_path / "hf", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "model")


def test_bfloat16_round_trip(tiny_model, tmp_path) -> None:
    save_with_tokenizer(make_model().bfloat16(), tiny_model, tmp_path / "model")
    export_hf(tmp_path / "model", tmp_path / "hf")
    assert json.loads((tmp_path / "hf/config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "hf").dtype == torch.bfloat16
    merge(tmp_path / "hf", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "model")


def test_conversion_of_a_folder_saved_by_transformers(exported, shared, tmp_path) -> None:
    """The folder does not contain the original files and has different weights."""
    model = AutoModelForImageTextToText.from_pretrained(exported)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    model.save_pretrained(tmp_path / "saved")
    AutoProcessor.from_pretrained(exported).save_pretrained(tmp_path / "saved")
    merge(tmp_path / "saved", tmp_path / "back")
    found = load_file(tmp_path / "back/model.safetensors")
    expected = load_file(shared / "conformance/tiny/model.safetensors")
    expected["language_model.lm_head.weight"] *= 0.5
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    check_same(tmp_path / "back", tmp_path / "saved", device=CPU)


def test_original_files_of_a_different_model_are_ignored(exported, tmp_path, caplog) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(exported, changed)
    config = json.loads((changed / "config.json").read_text())
    config["vision_feature_layer"] = -2
    (changed / "config.json").write_text(json.dumps(config))
    assert read_config(exported).select_layer == -1
    assert read_config(changed).select_layer == -2
    assert "describes a different model" in caplog.text


def test_original_configuration_is_restored(exported, shared) -> None:
    assert read_config(exported).raw == read_config(shared / "conformance/tiny").raw


def test_wrapped_checkpoint_is_merged(shared, tmp_path, capsys) -> None:
    wrapped, target = shared / "conformance/tiny_lora_trained", tmp_path / "hf"
    assert m3llm(["export", str(wrapped), str(target), "--device", "cpu", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["checked_records"] == 6 and row["logits_difference"] < 1e-4
    assert m3llm(["export", str(wrapped), str(target), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["already_exported"] is True


def test_command_round_trip(tiny_model, tmp_path, capsys) -> None:
    hf, back = str(tmp_path / "hf"), str(tmp_path / "back")
    assert m3llm(["export", str(tiny_model), hf, "--device", "cpu"]) == 0
    assert m3llm(["export", "--format", "internvl", hf, back, "--device", "cpu"]) == 0
    assert "checked on 6 synthetic records" in capsys.readouterr().out
    assert contents(Path(back)) == contents(tiny_model)
    assert m3llm(["generate", "--model", hf, "what is this?", "--max_new_tokens", "2"]) == 0


def test_different_result_is_deleted(tiny_model, tmp_path, monkeypatch, capsys) -> None:
    from internvl_chat.convert import export

    def damaged(weights):
        theirs = real(weights)
        head = theirs["lm_head.weight"]
        return theirs | {"lm_head.weight": lambda: head() * 1.01}

    real = export.to_hf_weights
    monkeypatch.setattr(export, "to_hf_weights", damaged)
    assert m3llm(["export", str(tiny_model), str(tmp_path / "out/hf"), "--device", "cpu"]) == 1
    assert "logits differ" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())
    assert m3llm(["export", str(tiny_model), str(tmp_path / "out/hf"), "--check", "False"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [({"use_thumbnail": False}, "thumbnail"), ({"dynamic_image_size": False, "pad2square": True}, "pad")],
)
def test_unsupported_preprocessing_is_rejected(tiny_model, tmp_path, options, message) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    file = tmp_path / "model/preprocessing.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))
    with pytest.raises(ModelError, match=message):
        export_hf(tmp_path / "model", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_target_with_other_content_is_rejected(tiny_model, tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("years of work")
    with pytest.raises(ModelError, match="choose a different folder"):
        export_hf(tiny_model, tmp_path)
