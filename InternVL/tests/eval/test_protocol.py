"""The published protocol: token ids and tiles, derived independently from the rules of the wrapper."""

import json
import tarfile
from hashlib import sha256
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from internvl_chat.constants import SYSTEM_TEXTS
from internvl_chat.data.encode.tokenizer import load_tokenizer
from internvl_chat.data.sources.records import Message
from internvl_chat.eval import protocol
from internvl_chat.eval.benchmarks.catalog import open_benchmark, system_prompts
from internvl_chat.eval.benchmarks.pmc_mi import FILES
from internvl_chat.eval.protocol import (
    PublishedEngine,
    are_published,
    find_published_prompts,
    published_preprocessing,
)
from internvl_chat.inference.engine import Prompt

# Options of a checkpoint that the wrapper ignores.
CONFIG = SimpleNamespace(
    template="internvl2_5", image_size=448, tokens_per_tile=256, min_dynamic_patch=2, max_dynamic_patch=6,
    dynamic_image_size=False, use_thumbnail=False, pad2square=True,
)  # fmt: skip
TASK_CONFIG = """
import os  # not run
TASKS = {
    "puretext": {"json_path": "a.json", "image_root": "images", "system_prompt": "Answer."},
    "multi-choice": {"json_path": "b.json", "image_root": "images", "system_prompt": "Choose."},
}
"""


@pytest.fixture(scope="module")
def engine(shared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    with tarfile.open(shared / "internvl3_tokenizer.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    tokenizer, _ = load_tokenizer(folder / "internvl3_tokenizer")
    return PublishedEngine(torch.nn.Identity(), tokenizer, published_preprocessing(CONFIG))


def count_tiles(width: int, height: int) -> int:
    """Number of tiles of an image with up to 12 tiles, plus a thumbnail if there are several."""
    best, least = (1, 1), abs(width / height - 1)
    for tiles in range(2, 13):
        for columns in [c for c in range(1, tiles + 1) if tiles % c == 0]:
            rows = tiles // columns
            distance = abs(width / height - columns / rows)
            if distance < least:
                best, least = (columns, rows), distance
            elif distance == least and width * height > 0.5 * 448**2 * tiles:
                best = (columns, rows)
    tiles = best[0] * best[1]
    return tiles + 1 if tiles > 1 else 1


def expected(raw: dict, system: str, folder) -> tuple[str, list[int]]:
    """Return the text that the wrapper gives the tokenizer, and the tiles of each image."""
    names = raw.get("images", [])
    tiles = [count_tiles(*Image.open(folder / name).size) for name in names]
    lines = [f"{label}: <image>" for label, _ in zip(raw["image_indices"], names, strict=False)]
    question = "\n".join([system, *lines, raw["question"]])
    text = f"<|im_start|>system\n{SYSTEM_TEXTS['internvl2_5']}<|im_end|>\n"
    text += f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    if tiles:
        before, after = text.split("<image>", 1)
        text = f"{before}<img>{'<IMG_CONTEXT>' * 256 * sum(tiles)}</img>{after}"
    return text, tiles


@pytest.mark.parametrize("task", FILES)
def test_token_ids_and_tiles_of_all_visible_items(shared, engine, task):
    items = open_benchmark("pmc-mi", shared / "pmc_mi", tasks=[task]).items
    rows = json.loads((shared / "pmc_mi/benchmark" / FILES[task]).read_text())
    assert len(items) == len(rows) == 25
    for item, raw in zip(items, rows, strict=True):
        text, tiles = expected(raw, f"Task: {task}.", shared / "pmc_mi/images")
        images = [Image.open(figure.path) for figure in item.figures]  # only their size is read
        encoded = engine.encode(Prompt(item.messages(f"Task: {task}."), images))
        assert [grid.tiles for grid in encoded.grids] == tiles
        assert encoded.input_ids.tolist() == engine.tokenizer(text, add_special_tokens=False).input_ids
        positions = encoded.image_positions.tolist()
        assert len(positions) == 256 * sum(tiles)
        assert not tiles or positions == list(range(positions[0], positions[-1] + 1))
        decoded = engine.tokenizer.decode(encoded.input_ids)
        assert decoded.count("<image>") == max(0, len(tiles) - 1) and decoded.count("<img>") == bool(tiles)


def test_images_do_not_share_the_tile_limit(engine):
    images = [Image.new("RGB", (1200, 900)) for _ in range(5)]
    text = "".join(f"Fig-{n}: <image>\n" for n in range(5)) + "Why?"
    encoded = engine.encode(Prompt([Message("user", text)], images))
    assert [grid.tiles for grid in encoded.grids] == [13] * 5  # 16,640 tokens, more than max_seq_length


def test_task_config_is_found_and_read_without_running_it(shared, tmp_path):
    (tmp_path / "benchmark_data").mkdir()
    assert find_published_prompts(tmp_path / "benchmark_data") is None
    file = tmp_path / "task_config.py"
    file.write_text(TASK_CONFIG)
    assert find_published_prompts(tmp_path / "benchmark_data") == find_published_prompts(tmp_path) == file
    benchmark = open_benchmark("pmc-mi", shared / "pmc_mi", tasks=["puretext", "multi-choice"])
    system = system_prompts(benchmark, file)
    assert system == {"puretext": "Answer.", "multi-choice": "Choose."}
    assert not are_published(system)


def test_published_prompts_are_recognized(monkeypatch):
    digests = {"puretext": sha256(b"Answer.").hexdigest()[:16], "multi-choice": "0" * 16}
    monkeypatch.setattr(protocol, "_PROMPT_DIGESTS", digests)
    assert are_published({"puretext": "Answer."})
    assert not are_published({"puretext": "Answer. "}) and not are_published({"puretext": None})
    assert not are_published({"puretext": "Answer.", "multi-choice": "Answer."})
