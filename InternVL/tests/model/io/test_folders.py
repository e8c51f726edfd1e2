"""Model folders: download, format, configuration and auxiliary files."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest
from model.conftest import CONTEXT

from internvl_chat.model.io import folders
from internvl_chat.model.io.adapter import BASE_FILE
from internvl_chat.model.io.checkpoint import load_model
from internvl_chat.model.io.folders import (
    model_folder,
    read_auxiliary_files,
    read_config,
    write_files,
)
from internvl_chat.utils.errors import ModelError


@pytest.mark.parametrize("name", ["no/such/folder", "./missing", "missing", "/nowhere"])
def test_no_such_folder(name: str) -> None:
    with pytest.raises(ModelError, match="no such model folder"):
        model_folder(name)


def test_unavailable_hub_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="organization/model: neither a local folder nor available"):
        load_model("organization/model", image_context_id=CONTEXT)


def test_hub_download_excludes_pickles(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    asked = {}

    def fetch(name: str, **options) -> str:
        asked.update(name=name, **options)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert model_folder("organization/model") == folder
    assert asked["name"] == "organization/model"
    assert not {"*.bin", "*.pt", "*.pth", "*.pkl"} & set(asked["allow_patterns"])


def test_auxiliary_files_are_copied_byte_for_byte(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir(), target.mkdir()
    kept = {
        "tokenizer_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "vocab.json",
        "merges.txt",
        "added_tokens.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "generation_config.json",
        "preprocessor_config.json",
        "preprocessing.json",
        "modeling_internvl_chat.py",
        "conversation.py",
        "processor_config.json",
        "video_preprocessor_config.json",
        "LICENSE",
        "NOTICE.txt",
        "USE_POLICY.md",
        "thresholds.yaml",
        "labels.csv",
    }
    left = {
        ".gitattributes",
        "README.md",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "model.gguf",
        "training_args.bin",
        "made_from.json",
        "evaluation.json",
        "predictions.1.jsonl",
        "config.json",
        "model.safetensors",
        "optimizer.pt",
        "trainer_state.json",
        "adapter_config.json",
        BASE_FILE,
    }
    for name in kept | left:
        (source / name).write_bytes(f"\xff {name}\r\n".encode("latin-1"))
    (source / "examples").mkdir()
    (target / "vocab.json").write_text("old")
    write_files(read_auxiliary_files(source), target)
    assert {file.name for file in target.iterdir()} == kept
    assert all((target / name).read_bytes() == (source / name).read_bytes() for name in kept)


def test_large_files_are_reported_and_not_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(folders, "_MAX_AUXILIARY_BYTES", 5)
    (tmp_path / "small.txt").write_text("12345")
    (tmp_path / "video.mp4").write_text("123456")
    assert read_auxiliary_files(tmp_path) == {"small.txt": b"12345"}
    assert f"{tmp_path / 'video.mp4'}: not copied, because it is larger than 5 bytes" in caplog.text


def test_copying_a_folder_onto_itself(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    link = tmp_path.parent / f"{tmp_path.name}-link"
    link.symlink_to(tmp_path)
    write_files(read_auxiliary_files(tmp_path), tmp_path)
    write_files(read_auxiliary_files(link), tmp_path)
    assert (tmp_path / "vocab.json").read_text() == "{}"
    shutil.rmtree(tmp_path)
    link.unlink()


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"model_type": "internvl"}',
        '{"model_type": "internvl_chat", "llm_config": 1}',
    ],
)
def test_malformed_configuration(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        read_config(tmp_path)
