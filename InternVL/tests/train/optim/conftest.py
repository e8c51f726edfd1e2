"""Compiled code of these tests, kept apart for each CPU capability: torch's cache takes one for the other."""

import os
import tempfile
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _compiler_cache():
    name = f"torchinductor-tests-{torch.__version__}-{torch.backends.cpu.get_cpu_capability()}"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / name)
