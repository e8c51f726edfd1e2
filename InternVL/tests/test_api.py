"""The public Python API: every snippet of docs/python_api.md, and fast import."""

import re
import subprocess
import sys

import pytest
from helpers import SOURCE_ROOT, flags
from PIL import Image

import internvl_chat
from internvl_chat.train import internvl_chat_finetune
from internvl_chat.train.internvl_chat_finetune import main as train
from internvl_chat.utils.errors import DataError, UsageError

PAGE = (SOURCE_ROOT / "docs/python_api.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
# Replacements in the training snippet, for a small model on the CPU.
SMALL = (
    ('"InternVL/internvl_chat', f'"{SOURCE_ROOT}/internvl_chat'),
    ('"OpenGVLab/InternVL3-8B"', '"work_dirs/run"'),
    ('output_dir="work_dirs/lora"', 'output_dir="work_dirs/lora", use_cpu=True, bf16=False, max_steps=1, '
     'gradient_accumulation_steps=1, max_dynamic_patch=1, force_image_size=56, dataloader_num_workers=0'),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model, sample_data):
    """Working folder with the files that the page mentions."""
    folder = tmp_path_factory.mktemp("api")
    run = flags(
        model_name_or_path=tiny_model,
        meta_path=sample_data / "train.json",
        output_dir=folder / "work_dirs/run",
        max_steps=1,
    )
    assert train(run) == 0
    for name in ("figure.jpg", "a.jpg", "b.jpg"):
        (folder / name).write_bytes(next((sample_data / "images").glob("*_fig1.jpg")).read_bytes())
    (folder / "PMC-data.json").write_text((sample_data / "train.json").read_text())
    (folder / "held_out.json").write_text((sample_data / "held_out.json").read_text())
    return folder


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda text: re.findall("import (.*)", text)[-1])
def test_snippet(snippet, folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    for documented, small in SMALL:
        snippet = snippet.replace(documented, small)
    exec(compile(snippet, "python_api.md", "exec"), {})
    assert capfd.readouterr().out.strip()


def test_page_lists_the_public_names():
    listed = re.findall(r"^\| `(\w+)\(", PAGE, flags=re.MULTILINE)
    assert sorted(listed) == sorted(internvl_chat.__all__)
    for name in internvl_chat.__all__:
        assert getattr(internvl_chat, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'lood'"):
        internvl_chat.lood  # noqa: B018


def test_import_loads_nothing():
    code = "import sys, internvl_chat; print({'torch', 'numpy', 'transformers'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_imports_of_the_training_script_log_nothing():
    script = internvl_chat_finetune.__file__
    result = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True)
    assert result.stderr == ""


def test_errors_are_clear(folder, monkeypatch):
    monkeypatch.chdir(folder)
    engine = internvl_chat.load("work_dirs/run")
    with pytest.raises(DataError, match=r"the image none.jpg does not exist"):
        engine.chat("What?", ["none.jpg"])
    with pytest.raises(UsageError, match="did you mean --max_steps"):
        internvl_chat.finetune(output_dir="out", meta_path="x", model_name_or_path="x", max_step=1)


def test_chat_takes_paths_and_images(folder):
    engine = internvl_chat.load(folder / "work_dirs/run")
    with Image.open(folder / "figure.jpg") as image:
        answers = [engine.chat("What?", [given], max_new_tokens=4)
                   for given in (str(folder / "figure.jpg"), image.convert("RGB"))]  # fmt: skip
    assert (
        answers[0]
        == answers[1]
        == engine.answer([internvl_chat.ask("What?", [Image.open(folder / "figure.jpg")])], max_new_tokens=4)[
            0
        ]
    )
