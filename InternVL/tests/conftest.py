"""Fixtures shared by all tests: the published reference data, a small model and a small dataset."""

import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from internvl_chat.cli import main as m3llm
from internvl_chat.data.synthetic.sample_data import write_sample_data

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCHERS = REPOSITORY / "InternVL/internvl_chat/shell/internvl3.0/2nd_finetune"

# Tests must not depend on the speed of the machine.
settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Use one thread, because tests run in parallel processes."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _compiler_cache():
    """Separate compiler cache: torch would reuse code compiled for a different CPU capability."""
    name = f"torchinductor-tests-{torch.__version__}-{torch.backends.cpu.get_cpu_capability()}"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / name)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Separate the cached record lengths of the tests from those of the user."""
    os.environ["M3LLM_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of the reference data: `M3LLM_SHARED`, or `shared` next to the repository."""
    folder = Path(os.environ.get("M3LLM_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "conformance").is_dir():
        pytest.skip(f"no reference data in {folder}; set M3LLM_SHARED to their folder")
    return folder


@pytest.fixture(scope="session")
def sample_data(tmp_path_factory) -> Path:
    """Output of `m3llm sample-data`: train.json and held_out.json, with 4 and 2 records per category."""
    folder = tmp_path_factory.mktemp("sample") / "data"
    write_sample_data(folder, train=4, held_out=2)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, sample_data) -> Path:
    """Output of `m3llm tiny-model`, with 56-pixel tiles of 4 tokens each."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    shape = {"image_size": 56, "vision_width": 32, "width": 48, "layers": 2, "heads": 4, "kv_heads": 2}
    flags = [text for name, value in shape.items() for text in (f"--{name}", str(value))]
    assert m3llm(["tiny-model", str(folder), "--text", str(sample_data / "train"), *flags]) == 0
    return folder


@pytest.fixture
def metrics():
    """Return a function that reads `metrics.jsonl` of an output folder."""

    def read(folder: Path) -> list[dict]:
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    return read
