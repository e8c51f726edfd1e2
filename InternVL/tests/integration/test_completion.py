"""Shell completion of `m3llm`: subcommands, flags and values, without importing torch."""

import os
import subprocess
import sys

import pytest
from helpers import SOURCE_ROOT

pytest.importorskip("argcomplete")


def complete(line: str, tmp_path, *, before: str = "") -> set[str]:
    """Return the completions at the end of a command line; `before` is code to run first."""
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCE_ROOT), os.environ.get("PYTHONPATH", "")]),
        "_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)),
        "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "offers"), "_ARGCOMPLETE_IFS": "\n",
    }  # fmt: skip
    code = f"{before}\nimport runpy; runpy.run_module('internvl_chat.cli', run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return {offer.strip() for offer in (tmp_path / "offers").read_text().split("\n")}


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("m3llm ", {"train", "data", "eval", "merge", "doctor"}),
        ("m3llm data ", {"check", "inspect"}),
        ("m3llm merge --", {"--base", "--device", "--check", "--json"}),
        ("m3llm train --", {"--learning_rate", "--use_llm_lora", "--report_to", "--max_steps"}),
        ("m3llm train recipe.yaml --lear", {"--learning_rate"}),
        ("m3llm train --attn ", {"auto", "sdpa", "varlen"}),
        ("m3llm train --bf16 ", {"True", "False"}),
    ],
)
def test_offers(line, offered, tmp_path):
    found = complete(line, tmp_path)
    assert found >= offered
    assert "--fp16" not in found


def test_completion_does_not_load_torch(tmp_path):
    broken = tmp_path / "broken"
    for library in ("torch", "transformers", "numpy"):
        (broken / library).mkdir(parents=True)
        (broken / library / "__init__.py").write_text("raise RuntimeError('loaded')")
    offers = complete("m3llm train --se", tmp_path, before=f"import sys; sys.path.insert(0, {str(broken)!r})")
    assert "--seed" in offers
