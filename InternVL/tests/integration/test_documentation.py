"""Every command in the documentation works, with small replacements for the weights and data."""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import HANG_SECONDS, SOURCE_ROOT, flags

from internvl_chat.cli import main as m3llm
from internvl_chat.eval.benchmarks.pmc_mi import FILES
from internvl_chat.train.arguments import parse_arguments
from internvl_chat.train.internvl_chat_finetune import main as train

REPOSITORY = SOURCE_ROOT.parent
DOCS = REPOSITORY / "InternVL/docs"
# The benchmark commands have separate tests.
PAGES = [REPOSITORY / "README.md", REPOSITORY / "full_training_data/README.md", SOURCE_ROOT / "README.md",
         *sorted(DOCS.glob("*.md"))]  # fmt: skip
CPU = "--use_cpu True --bf16 False"
SMALL = "--force_image_size 56 --max_dynamic_patch 1 --max_steps 1 --dataloader_num_workers 0"

# Not run here: quickstart and acceptance run have slow tests; test_serve.py and test_web.py run the servers;
# the others set up or test the repository.
ELSEWHERE = (
    "bash InternVL/internvl_chat/shell/quickstart.sh",
    # eval/test_compare.py
    "m3llm eval compare work_dirs/eval-base work_dirs/eval --out work_dirs/compare",
    # eval/test_judge.py
    "export OPENAI_API_KEY=... && m3llm eval --bench pmc-mi --data PMC-MI-Bench --model /models/InternVL3-8B "
    "--out work_dirs/eval --judge http://localhost:8000/v1 --judge_model Qwen/Qwen3-32B",
    "bash InternVL/internvl_chat/shell/gpu_check.sh --out work_dirs/gpu_check",
    "bash InternVL/internvl_chat/shell/test.sh",
    "bash InternVL/internvl_chat/shell/test.sh -m slow",
    "python3 -m venv .venv && source .venv/bin/activate",
    'pip install -e ".[dev]"',
    'pip install -e ".[eval]"',
    'pip install -e ".[quantization]"',
    # bitsandbytes is optional: integration/test_adapters.py.
    "m3llm train InternVL/internvl_chat/shell/recipes/qlora.yaml --model_name_or_path /models/InternVL3-8B",
    'pip install -e ".[ui]"',
    "m3llm serve work_dirs/merged",
    "m3llm web work_dirs/run",
    "m3llm web work_dirs/run work_dirs/merged",
    "m3llm parity work_dirs/merged --endpoint http://localhost:8000",
    # A server: commands/test_browse.py.
    "m3llm data browse InternVL/internvl_chat/shell/data/PMC-data.json --model /models/InternVL3-8B",
    # data/test_shard_writer.py
    "m3llm data shard InternVL/internvl_chat/shell/data/PMC-data.json work_dirs/shards",
    "pre-commit install",
    "python InternVL/docs/make_flags.py",
    # test_containers.py
    "python InternVL/docker/make_constraints.py",
)


def documented_commands() -> list[str]:
    """Return the commands in `bash` blocks; a block that creates a folder is a single command."""
    commands = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL):
            folder, lines = "", []
            for line in block.replace("\\\n", " ").splitlines():
                line = line.split("  #")[0].strip()
                if line.startswith("export "):
                    folder = f"{line} && "
                    continue
                if line.startswith("cd "):
                    folder = f"{line} && "
                elif line:
                    lines.append(folder + line)
            commands += [" && ".join(lines)] if "mkdir" in block else lines
    return sorted(set(commands) - set(ELSEWHERE))


def test_there_are_commands():
    assert len(documented_commands()) >= 20


@pytest.fixture(scope="module")
def stage(tmp_path_factory, tiny_model, sample_data):
    """A folder that resembles the repository after a training run."""
    folder = tmp_path_factory.mktemp("stage")
    (folder / "InternVL").symlink_to(SOURCE_ROOT)
    figure = next((sample_data / "images").glob("*_fig1.jpg"))
    (folder / "figure.jpg").write_bytes(figure.read_bytes())
    for name in ("a.jpg", "b.jpg"):
        (folder / name).write_bytes(figure.read_bytes())
    (folder / "benchmark").mkdir()
    (folder / "benchmark/items.json").write_text('[{"question": "What does PMC1 show?"}]')
    shutil.copy(sample_data / "train.json", folder / "held_out.json")
    write_small_benchmark(folder / "PMC-MI-Bench", figure)
    rows = [json.dumps({"task": task, "index": 0, "prediction": "A"}) + "\n" for task in FILES]
    (folder / "answers.jsonl").write_text("".join(rows))
    for name in ("M3LLM-fulldatav2-lora-lr=5e-6", "lora"):
        argv = flags(
            model_name_or_path=tiny_model,
            meta_path=sample_data / "train.json",
            output_dir=folder / "work_dirs" / name,
            use_llm_lora=2,
            freeze_llm=True,
            freeze_mlp=True,
            max_steps=1,
        )
        assert train(argv) == 0
    run = folder / "work_dirs/run"
    argv = flags(
        model_name_or_path=tiny_model,
        meta_path=sample_data / "train.json",
        output_dir=run,
        max_steps=1,
    )
    assert train(argv) == 0
    merged = folder / "work_dirs/merged"
    assert m3llm(["merge", str(folder / "work_dirs/lora"), str(merged)]) == 0
    assert m3llm(["export", str(merged), str(merged) + "-hf"]) == 0
    config = (run / "config.yaml").read_text().replace(str(run), str(run) + "-again")
    (run / "config.yaml").write_text(config)
    return folder


def write_small_benchmark(folder, figure):
    """Write one item per task in the layout of PMC-MI-Bench."""
    (folder / "images").mkdir(parents=True)
    (folder / "images/figure.jpg").write_bytes(figure.read_bytes())
    item = {
        "question": "What? A. One\nB. Two",
        "gt": "A",
        "images": ["figure.jpg"],
        "image_indices": ["Fig-0"],
    }
    for name in FILES.values():
        (folder / name).write_text(json.dumps([item]))


# Replacements that make a documented command small or redirect its output: pattern -> replacement.
STAND_INS = (
    (r"/models/InternVL3-8B", "{model}"),
    (r"InternVL/internvl_chat/shell/data/PMC-data\.json", "{meta}"),
    (r"\bGPUS=\d+ ", "GPUS=0 "),
    (r"PARALLEL=fsdp", "NPROC=2 PARALLEL=fsdp"),
    (r"--eval_meta_path held_out\.json", "--eval_meta_path {stage}/held_out.json"),
    (r"(data check my_data/\S+)", r"\1 --data_root {stage}"),
    (r"(bash \S*M3LLM-fulldata-.*)", rf"\1 {SMALL}"),
    (r"(.*/recipes/.*)", rf"\1 {CPU} --meta_path {{meta}} --output_dir {{out}} {SMALL}"),
    (r"_steps 200", "_steps 1"),
    (r"^(m3llm (?:merge|export) [^&]*?)(\S+)$", r"\1{out}/made"),
    (r"--out \S+", "--out {out}/eval"),
    (r"--predictions \S+", "--predictions {stage}/answers.jsonl"),
    (r"(.*m3llm (?:generate|chat) .*|.*--bench .* --model .*)", r"\1 --max_new_tokens 4"),
    # test_benchmark.py evaluates on two ranks.
    (r"torchrun --nproc_per_node 2 -m internvl_chat\.cli", "m3llm"),
)


# A command of `m3llm` alone, possibly with variables, runs in this process; a pipe needs a shell.
ALONE = re.compile(r"(?:export \S+ && )*m3llm [^|>]*")


def run_here(command: str, monkeypatch) -> None:
    """Run a command of `m3llm` alone in this process, which has imported everything already."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("Why?\n"))  # for m3llm chat
    for part in command.split(" && "):
        program, *words = shlex.split(part)
        if program == "export":
            monkeypatch.setenv(*words[0].split("=", 1))
        else:
            assert m3llm(words) == 0, part


def run_in_shell(command: str, folder: Path) -> None:
    """Run a command in a shell; a launcher's interpreter only stores its arguments, for `launched_flags`."""
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" > "{folder}/launched"\n')
    python.chmod(0o755)
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        capture_output=True, text=True, timeout=HANG_SECONDS, env=os.environ | {"PYTHON": str(python)},
    )  # fmt: skip
    assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"


def launched_flags(folder: Path) -> list[str]:
    """Return the flags that a launcher gave the training script."""
    words = (folder / "launched").read_text().split("\0")[:-1]
    [script] = [place for place, word in enumerate(words) if word.endswith("/internvl_chat_finetune.py")]
    return words[script + 1 :]


@pytest.mark.parametrize("command", documented_commands())
def test_command(command, stage, tiny_model, sample_data, tmp_path, monkeypatch):
    """The launchers' torchrun has tests of its own: here their flags train on one rank in this process."""
    small = command
    places = {"model": tiny_model, "meta": sample_data / "train.json", "stage": stage, "out": tmp_path}
    for pattern, stand_in in STAND_INS:
        for name, place in places.items():
            stand_in = stand_in.replace(f"{{{name}}}", str(place))
        small = re.sub(pattern, stand_in, small)
    environment = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "GPUS": "0",
        "MODEL_PATH": str(tiny_model),
        "META_PATH": str(sample_data / "train.json"),
        "DATA_ROOT": str(stage),
        "OUTPUT_DIR": str(tmp_path / "out"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(SOURCE_ROOT),
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(stage)
    if ALONE.fullmatch(small):
        run_here(small, monkeypatch)
    else:
        run_in_shell(small, tmp_path)
        if "M3LLM-fulldata-" in small:
            given = launched_flags(tmp_path)
            if "fsdp" in given:  # needs several ranks; test_processes.py trains with it
                assert parse_arguments(given).run.parallel == "fsdp"
            else:
                assert train(given) == 0


@pytest.mark.slow
def test_quickstart(tmp_path):
    """Run the entire quickstart in an existing environment."""
    environment = {**os.environ, "WORK_DIR": str(tmp_path / "quickstart")}
    command = ["bash", str(SOURCE_ROOT / "internvl_chat/shell/quickstart.sh")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=HANG_SECONDS)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "WARNING" not in result.stdout + result.stderr
    question = result.stdout.split("source .venv/bin/activate\n", 1)[1].split("\n== done")[0]
    assert m3llm(shlex.split(question)[1:]) == 0
    for path in (
        "report.html",
        "full/loss.png",
        "merged/model.safetensors",
        "lora/adapter_model.safetensors",
    ):
        assert (tmp_path / "quickstart" / path).is_file()
