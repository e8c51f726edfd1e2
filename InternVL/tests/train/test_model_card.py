"""The model card: content, front matter, and protection of the user's README."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import yaml
from helpers import flags
from huggingface_hub import ModelCard

from internvl_chat.convert.export import export_hf
from internvl_chat.convert.merge import merge
from internvl_chat.convert.model_card import CARD, CARD_MARK, base_names
from internvl_chat.train.arguments import parse_arguments
from internvl_chat.train.checkpoint.run_folder import inspect_output_folder
from internvl_chat.train.internvl_chat_finetune import main as train
from internvl_chat.train.model_card import describe_run, read_validation


def run(output: Path, model: Path, sample_data: Path, **changes) -> Path:
    settings = {
        "model_name_or_path": model,
        "output_dir": output,
        "meta_path": sample_data / "train.json",
        "freeze_llm": True,
        "freeze_mlp": True,
        "use_llm_lora": 4,
        "max_steps": 2,
        **changes,
    }
    assert train(flags(**settings)) == 0
    return output / CARD


@pytest.fixture(scope="module")
def card(tiny_model, sample_data, tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("run") / "medical", tiny_model, sample_data)


def row(text: str, name: str) -> list[str]:
    """Return the cells of a table row except the first."""
    [line] = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_front_matter_is_valid_on_the_hub(card) -> None:
    data = ModelCard.load(card).data.to_dict()
    assert data["license"] == "unknown" and data["library_name"] == "peft"
    assert data["pipeline_tag"] == "image-text-to-text" and "lora" in data["tags"]
    assert "base_model" not in data  # a local folder is not a Hub id


def test_data_section_has_hashes_and_counts(card, sample_data) -> None:
    text = card.read_text(encoding="utf-8")
    for name, entry in json.loads((sample_data / "train.json").read_text()).items():
        annotation = Path(entry["annotation"])
        digest = hashlib.sha256(annotation.read_bytes()).hexdigest()
        assert row(text, name) == ["4", "6", annotation.name, f"`{digest}`"]


def test_recipe_and_training_sections(card, metrics) -> None:
    text, steps = card.read_text(encoding="utf-8"), metrics(card.parent)
    assert row(text, "use_llm_lora") == ["4"]
    assert row(text, "max_steps") == ["2"]
    assert row(text, "learning_rate") == ["0.001"]
    assert row(text, "hardware at the end") == ["1 x CPU"]
    assert row(text, "records") == [str(sum(step["records"] for step in steps))]
    assert row(text, "loss, mean of the last 1 step(s)") == [f"{steps[-1]['loss']:.4f}"]
    assert "There was no validation" in text


def test_card_has_no_secrets_or_paths(card, tiny_model, sample_data, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("WANDB_API_KEY", "another_secret")
    again = run(tmp_path / "run", tiny_model, sample_data)
    for text in (card.read_text(encoding="utf-8"), again.read_text(encoding="utf-8")):
        for secret in (
            "secret",
            str(tiny_model.parent),
            str(sample_data),
            str(tmp_path),
            str(card.parent.parent),
        ):
            assert secret not in text


def test_license_of_the_base_model(tiny_model, sample_data, tmp_path) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "InternVL3-tiny"))
    (base / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# A base\n")
    text = run(tmp_path / "run", base, sample_data).read_text(encoding="utf-8")
    assert yaml.safe_load(text.split("---")[1])["license"] == "apache-2.0"
    assert "Adapters (LoRA) for InternVL3-tiny." in text


HUB = "OpenGVLab/InternVL3-8B"


@pytest.mark.parametrize(
    ("folder", "files", "name"),
    [
        ("hub/models--OpenGVLab--InternVL3-8B/snapshots/1a2b", {}, HUB),
        ("weights", {"config.json": {"_name_or_path": HUB}}, HUB),
        ("InternVL3-8B", {"config.json": {"_name_or_path": "/mnt/petrelfs/InternVL3-8B"}}, HUB),
        ("InternVL3_5-30B-A3B-HF", {}, "OpenGVLab/InternVL3_5-30B-A3B-HF"),
        ("my-base", {"config.json": {"_name_or_path": "./a/b"}}, "my-base"),
        ("my-base", {"config.json": [1]}, "my-base"),
        ("InternVL3-8B-medical", {}, "InternVL3-8B-medical"),
        # The results of runs and merges are different models.
        ("InternVL3-8B", {"train_results.json": {}}, "InternVL3-8B"),
        ("merged", {"config.json": {"_name_or_path": HUB}, "made_from.json": {}}, "merged"),
    ],
)
def test_hub_id_of_a_local_base(tmp_path, folder, files, name) -> None:
    path = tmp_path / folder
    path.mkdir(parents=True)
    for file, content in files.items():
        (path / file).write_text(json.dumps(content))
    assert base_names([str(path), "another/model"]) == [name, "another/model"]


def test_base_model_of_a_local_folder_with_a_known_id(tiny_model, sample_data, tmp_path) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "weights"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"_name_or_path": HUB}))
    data = ModelCard.load(run(tmp_path / "run", base, sample_data)).data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == (HUB, "adapter")


def test_validation_data_have_hashes(tiny_model, sample_data, tmp_path) -> None:
    meta = sample_data / "train.json"
    text = run(
        tmp_path / "run", tiny_model, sample_data, eval_meta_path=meta, eval_strategy="steps", eval_steps=2
    ).read_text(encoding="utf-8")
    validated = text.split("## Validation")[1]
    for name, entry in json.loads(meta.read_text()).items():
        digest = hashlib.sha256(Path(entry["annotation"]).read_bytes()).hexdigest()
        assert row(validated, name)[-1] == f"`{digest}`"
        assert float(row(validated, f"loss, {name}")[0]) > 0


def test_card_is_carried_over_by_merge_and_export(card, tmp_path) -> None:
    text = card.read_text(encoding="utf-8")
    merge(card.parent, tmp_path / "merged")
    export_hf(card.parent, tmp_path / "exported")
    merged = (tmp_path / "merged" / CARD).read_text(encoding="utf-8")
    assert (tmp_path / "exported" / CARD).read_text(encoding="utf-8") == merged
    data = ModelCard.load(tmp_path / "merged" / CARD).data.to_dict()
    assert "library_name" not in data and data["license"] == "unknown"
    [line] = [line for line in merged.splitlines() if "fine-tuned version of" in line]
    assert line.endswith("a fine-tuned version of tiny.")
    assert merged.split("**License")[1] == text.split("**License")[1]
    # A round trip adds nothing.
    export_hf(tmp_path / "merged", tmp_path / "there")
    merge(tmp_path / "there", tmp_path / "back")
    assert (tmp_path / "back" / CARD).read_text(encoding="utf-8") == merged


def test_foreign_readme_is_copied(tiny_model, tmp_path) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    (base / CARD).write_bytes(b"# Mine\r\n\xff")
    merge(base, tmp_path / "merged")
    assert (tmp_path / "merged" / CARD).read_bytes() == b"# Mine\r\n\xff"


def test_user_readme_is_kept(tiny_model, sample_data, tmp_path, caplog) -> None:
    (tmp_path / CARD).write_text("# My notes\n")
    assert run(tmp_path, tiny_model, sample_data).read_text() == "# My notes\n"
    found = inspect_output_folder(tmp_path, overwrite=True, resume=None)
    found.open().release()
    assert (tmp_path / CARD).read_text() == "# My notes\n"


def test_card_of_an_earlier_run_is_replaced(tmp_path) -> None:
    (tmp_path / CARD).write_text(f"---\nlicense: unknown\n---\n{CARD_MARK}\n")
    inspect_output_folder(tmp_path, overwrite=False, resume=None).open().release()
    assert not (tmp_path / CARD).exists()


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ({"freeze_backbone": True}, "projector, language model; learning rate 5e-6, 16 records per step"),
        (
            {"freeze_backbone": True, "freeze_llm": True, "freeze_mlp": True, "use_llm_lora": 16},
            "LoRA of rank 16 in the language model; learning rate 5e-6, 16 records per step",
        ),
        (
            {"use_backbone_lora": 4, "freeze_llm": True},
            "LoRA of rank 4 in the vision tower, projector; learning rate 5e-6, 16 records per step",
        ),
        (
            {"freeze_backbone": True, "freeze_llm": True, "freeze_mlp": True, "unfreeze_lm_head": True},
            "selected layers; learning rate 5e-6, 16 records per step",
        ),
    ],
)
def test_description_of_a_run(recipe, expected) -> None:
    given = {"model_name_or_path": "OpenGVLab/InternVL3-8B", "meta_path": "d", "output_dir": "o"}
    batch = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    config = parse_arguments(flags(**given, **batch, learning_rate=5e-6, **recipe))
    assert describe_run(config) == f"OpenGVLab/InternVL3-8B, trained: {expected}"


def test_validation_metrics_match_the_model(tmp_path) -> None:
    file = tmp_path / "validation.jsonl"
    assert read_validation(file, None) == {}
    rows = [
        {"step": step, "loss": loss, "em": None, "sets": {"qa": {"loss": 2 * loss, "em": 50.0}}}
        for step, loss in ((2, 1.5), (4, 1.75))
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_validation(file, None) == {"loss, all": 1.75, "loss, qa": 3.5, "em, qa": 50.0}
    with file.open("a") as stream:
        stream.write('{"step": 6, "lo')  # truncated by a crash
    assert read_validation(file, 2) == {"loss, all": 1.5, "loss, qa": 3.0, "em, qa": 50.0}
