"""The peak memory of merge and export depends on the shard size, not on the number of shards."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import HANG_SECONDS
from model.conftest import make_config

from internvl_chat.model.io.checkpoint import empty_model
from internvl_chat.model.io.folders import read_auxiliary_files, write_config, write_files
from internvl_chat.model.io.weights import write_weights
from internvl_chat.model.tiny import TinyShape

SHARD = 24 << 20
# Run in a separate process: prints the peak memory in bytes, without the memory of the libraries.
CHILD = """
import json, sys, threading, time
from pathlib import Path
from internvl_chat.convert.export import export_hf
from internvl_chat.convert.merge import merge
import psutil

source, target, work, shard = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
me = psutil.Process()
before = most = me.memory_info().rss
ended = False

def watch():
    global most
    while not ended:
        most = max(most, me.memory_info().rss)
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
(merge if work == "merge" else export_hf)(source, target, max_shard_bytes=shard)
ended = True
watcher.join()
print(json.dumps(most - before))
"""


def write_large(folder: Path, tiny_model: Path, layers: int) -> Path:
    """Write a LoRA-wrapped model with many layers in the reference format, in shards of SHARD bytes."""
    vocabulary = len(json.loads((tiny_model / "vocab.json").read_text())) + 12
    shape = TinyShape(
        image_size=56,
        vision_width=32,
        vision_layers=1,
        vision_heads=2,
        width=512,
        layers=layers,
        heads=8,
        kv_heads=2,
    )
    config = make_config(shape, llm={"vocab_size": vocabulary})
    folder.mkdir()
    write_files(read_auxiliary_files(tiny_model), folder)
    model = empty_model(config, 0, torch.float32, "sdpa")
    weights = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("language_model."):
            name = "language_model.base_model.model." + name.removeprefix("language_model.")
        if not name.endswith("mlp.up_proj.weight"):
            weights[name] = lambda t=tensor: torch.zeros_like(t)
            continue
        layer = name.removesuffix(".weight")
        weights[f"{layer}.base_layer.weight"] = lambda t=tensor: torch.zeros_like(t)
        for letter, sides in (("A", (4, tensor.shape[1])), ("B", (tensor.shape[0], 4))):
            weights[f"{layer}.lora_{letter}.default.weight"] = lambda s=sides: torch.ones(s)
    write_weights(weights, folder, max_shard_bytes=SHARD)
    config.use_llm_lora = 4
    write_config(config, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("work", ["merge", "export"])
def test_peak_memory_does_not_grow_with_the_shards(tiny_model, tmp_path, work) -> None:
    peaks, shards = [], []
    for layers in (3, 14):
        source = write_large(tmp_path / f"{layers}-layers", tiny_model, layers)
        target = tmp_path / f"{layers}-{work}"
        command = [sys.executable, "-c", CHILD, str(source), str(target), work, str(SHARD)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS)
        assert result.returncode == 0, result.stderr
        peaks.append(json.loads(result.stdout.splitlines()[-1]))
        shards.append(len(list(target.glob("*.safetensors"))))
        shutil.rmtree(source)
    few, many = peaks
    assert shards[1] >= 3 * shards[0], shards
    assert many < few + SHARD, f"{few:,} bytes with {shards[0]} shards, {many:,} with {shards[1]}"
    assert many < 5 * SHARD
