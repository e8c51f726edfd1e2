"""Bad input: one clear message, the documented exit code, and no output files."""

import json
import shutil

import pytest
import torch
from helpers import flags
from safetensors.torch import load_file, save_file

from internvl_chat.cli import main as m3llm
from internvl_chat.model.io.adapter import ADAPTER_WEIGHTS
from internvl_chat.train.internvl_chat_finetune import main as train
from internvl_chat.utils.folder_lock import lock_folder

MESSAGES = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]


@pytest.fixture
def start(tiny_model, sample_data, tmp_path):
    """Return a function that trains one step with changes and returns the exit code and the output folder."""

    def run(**changes):
        values = {
            "model_name_or_path": tiny_model,
            "meta_path": sample_data / "train.json",
            "output_dir": tmp_path / "out",
            "max_steps": 1,
            "save_strategy": "no",
        }
        return train(flags(**{**values, **changes})), tmp_path / "out"

    return run


@pytest.fixture
def one_set(sample_data, tmp_path):
    """Return a function that writes a dataset with the given lines and its meta file."""

    def write(*lines, **entry):
        annotation = tmp_path / "records.jsonl"
        text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        annotation.write_text("\n".join(text) + "\n")
        meta = {
            "set": {
                "root": str(sample_data / "images"),
                "annotation": str(annotation),
                "data_augment": False,
                "repeat_time": 1,
                **entry,
            }
        }
        path = tmp_path / "meta.json"
        path.write_text(json.dumps(meta))
        return path

    return write


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such meta file"),
        ("{", "not valid JSON"),
        ("[]", "must be a JSON object"),
        ("{}", "contains no datasets"),
        ('{"a": {"root": "$NOT_SET_ANYWHERE/x"}}', "export NOT_SET_ANYWHERE=FOLDER"),
    ],
)
def test_meta_file(start, tmp_path, caplog, capfd, content, message):
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_text(content)
    code, out = start(meta_path=path)
    assert code == 1
    assert message in capfd.readouterr().err
    assert not out.exists()


RECORDS = {
    "not valid JSON": '{"conversations": [',
    "no assistant message": {"conversations": MESSAGES[:1], "image": "x.jpg"},
    "unknown role 'robot'": {"conversations": [{"from": "robot", "value": "?"}, MESSAGES[1]]},
    "1 <image> placeholders in the human messages, but 2 images": {
        "conversations": MESSAGES,
        "image": ["a", "b"],
    },
    "does not exist": {"id": "lost", "conversations": MESSAGES, "image": "missing.jpg"},
}


@pytest.mark.parametrize("message", RECORDS)
@pytest.mark.parametrize("workers", [0, 1])
def test_record_names_file_and_line(start, one_set, capfd, message, workers):
    good = {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    meta = one_set(good, good, RECORDS[message])
    code, out = start(
        meta_path=meta, train_sampling_strategy="sequential", per_device_train_batch_size=3,
        dataloader_num_workers=workers,
    )  # fmt: skip
    assert code == 1
    error = capfd.readouterr().err
    assert message in error
    assert "records.jsonl, line 3" in error
    assert "Traceback" not in error
    assert not list(out.glob("*.safetensors"))


def test_broken_image(start, one_set, sample_data, capfd, tmp_path):
    image = next((sample_data / "images").glob("*.jpg"))
    (tmp_path / "truncated.jpg").write_bytes(image.read_bytes()[:2000])
    (tmp_path / "text.jpg").write_text("not an image")
    for name in ("truncated.jpg", "text.jpg"):
        meta = one_set({"id": name, "conversations": MESSAGES, "image": name}, root=str(tmp_path))
        code, _ = start(meta_path=meta)
        assert code == 1
        error = capfd.readouterr().err
        assert "records.jsonl, line 1" in error
        assert name in error


NORM = "language_model.model.norm.weight"
NAN_MODEL = f"1 weight is not finite: {NORM} (1 NaN in 48 values)"


@pytest.fixture
def damaged_model(tiny_model, tmp_path):
    """The small model with one NaN weight, as after an overflow or file corruption."""
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    weights[NORM][3] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "--model", "MODEL", "hi"],
        ["loss", "META", "--model", "MODEL", "--limit", "1"],
        ["eval", "META", "--model", "MODEL", "--limit", "1"],
        ["parity", "MODEL", "GOOD", "--meta", "META", "--limit", "1"],
        ["parity", "GOOD", "MODEL", "--meta", "META", "--limit", "1", "--max_new_tokens", "1"],
        ["merge", "MODEL", "OUT"],
        ["export", "MODEL", "OUT", "--check", "False"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_non_finite_weights_are_refused_by_every_command(
    damaged_model, tiny_model, sample_data, tmp_path, capsys, command
):
    paths = {"MODEL": damaged_model, "GOOD": tiny_model, "META": sample_data / "held_out.json",
             "OUT": tmp_path / "out"}  # fmt: skip
    assert m3llm([str(paths.get(word, word)) for word in command]) == 1
    captured = capsys.readouterr()
    assert f"{damaged_model}: {NAN_MODEL}" in captured.err
    assert not captured.out
    assert {path.name for path in tmp_path.iterdir()} == {"damaged"}


@pytest.mark.parametrize("sanity_check", [True, False])
def test_non_finite_weights_are_refused_by_training(start, damaged_model, capfd, sanity_check):
    code, out = start(model_name_or_path=damaged_model, sanity_check=sanity_check)
    error = capfd.readouterr().err
    assert code == 1 and f"{damaged_model}: {NAN_MODEL}" in error
    assert "attention" not in error
    assert not list(out.glob("*.safetensors"))


def test_non_finite_weights_in_the_transformers_format(tiny_model, sample_data, tmp_path, capsys):
    """Parity loads this format with transformers, which does not check the values."""
    assert m3llm(["export", str(tiny_model), str(tmp_path / "hf"), "--check", "False"]) == 0
    file = tmp_path / "hf/model.safetensors"
    weights = load_file(file)
    weights["model.vision_tower.encoder.layer.0.layernorm_before.weight"][0] = torch.inf
    save_file(weights, file, metadata={"format": "pt"})
    meta = str(sample_data / "held_out.json")
    assert m3llm(["parity", str(tmp_path / "hf"), str(tiny_model), "--meta", meta, "--limit", "1"]) == 1
    assert "encoder.layer.0.layernorm_before.weight (1 Inf in 32 values)" in capsys.readouterr().err
    assert m3llm(["generate", "--model", str(tmp_path / "hf"), "hi"]) == 1
    assert "encoder.layers.0.norm1.weight (1 Inf in 32 values)" in capsys.readouterr().err


def test_all_configuration_problems_at_once(start, tmp_path, capfd):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("mine")
    code, out = start(
        model_name_or_path=tmp_path / "nowhere",
        meta_path=tmp_path / "no.json",
        optim="lomo",
        min_dynamic_patch=9,
        attn="flash_attention_2",
    )
    error = capfd.readouterr().err
    assert code == 2
    for message in (
        "no such model folder", "no such meta file", "--optim lomo", "--min_dynamic_patch",
        "needs an NVIDIA GPU", "is in use (it contains thesis.txt)",
    ):  # fmt: skip
        assert message in error
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]


def test_unknown_flag(tmp_path, capfd):
    assert train(["--output_dir", str(tmp_path), "--lerning_rate", "1"]) == 2
    error = capfd.readouterr().err
    assert "unknown flag --lerning_rate; did you mean --learning_rate?" in error
    assert "--meta_path is required" in error


def test_model_folder_without_weights(start, tiny_model, tmp_path, capfd):
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    code, out = start(model_name_or_path=tmp_path / "model")
    assert code == 1
    assert "no weights" in capfd.readouterr().err
    assert not out.exists()


LORA = {"use_llm_lora": 2, "freeze_llm": True, "freeze_mlp": True}


def test_adapter_of_another_rank_or_base(start, tiny_model, tmp_path, capfd):
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    code, adapter = start(model_name_or_path=base, **LORA)
    assert code == 0
    assert (adapter / ADAPTER_WEIGHTS).is_file()
    capfd.readouterr()

    code, _ = start(model_name_or_path=adapter, output_dir=tmp_path / "more", **{**LORA, "use_llm_lora": 4})
    assert code == 2
    assert "adapters of rank 2" in capfd.readouterr().err
    assert not (tmp_path / "more").exists()

    code, _ = start(model_name_or_path=adapter, output_dir=tmp_path / "more", **LORA)
    assert code == 0

    capfd.readouterr()
    dora = {**LORA, "use_dora": True}
    code, _ = start(model_name_or_path=adapter, output_dir=tmp_path / "never", **dora)
    assert code == 2
    assert "contains adapters trained with --use_dora False" in capfd.readouterr().err

    weights = base / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    capfd.readouterr()
    code, _ = start(model_name_or_path=adapter, output_dir=tmp_path / "never", **LORA)
    assert code == 1
    assert ": these weights (sha256" in capfd.readouterr().err
    assert m3llm(["merge", str(adapter), str(tmp_path / "merged")]) == 1
    assert not (tmp_path / "merged").exists()


def test_output_folder_in_use(start, tmp_path, capfd):
    code, out = start()
    assert code == 0
    code, _ = start()
    assert code == 2
    assert "contains a finished run" in capfd.readouterr().err
    lock = lock_folder(out)
    code, _ = start(overwrite_output_dir=True)
    assert code == 2
    assert "is writing to this output folder" in capfd.readouterr().err
    lock.release()
    code, _ = start(overwrite_output_dir=True)
    assert code == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_train": False}, "this script only trains"),
        ({"eval_strategy": "steps"}, "--eval_strategy steps needs --eval_meta_path"),
        ({"max_steps": 0}, "no training steps"),
        ({"max_steps": -1, "num_train_epochs": 0}, "no training steps"),
        ({"gradient_accumulation_steps": 0}, "must be at least 1"),
        ({"report_to": "carrier-pigeon"}, "--report_to carrier-pigeon: unknown"),
        ({"fp16": True}, "trains in bfloat16"),
        ({"use_llm_lora": -1}, "must be at least 0"),
        ({"dataloader_prefetch_factor": 2}, "--dataloader_prefetch_factor 2 needs --dataloader_num_workers"),
        ({"mlp_path": "mlp.pt"}, "--mlp_path mlp.pt: has no effect with --model_name_or_path"),
        ({"freeze_llm": True, "freeze_mlp": True}, "all parameters are frozen"),
        ({"deepspeed": "nowhere.json"}, "nowhere.json"),
        ({"down_sample_ratio": 0.25}, "must be 0.5, as in the model"),
        ({"force_image_size": 50}, "is not a whole number of tokens"),
        ({"lr_scheduler_type": "zigzag"}, "--lr_scheduler_type"),
        ({"fsdp": "full_shard"}, "--parallel fsdp: a single rank has nothing to shard"),
        ({"parallel": "hsdp"}, "--parallel hsdp: a single rank has nothing to shard"),
        (
            {"cpu_offload": True, "optim": "adamw_8bit"},
            "--cpu_offload True: --optim adamw_8bit updates weights on GPUs only",
        ),
        (
            {
                "deepspeed": '{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}',
                "optim": "adamw_8bit",
            },
            '"zero_optimization.offload_optimizer": --optim adamw_8bit updates weights on GPUs only',
        ),
        ({"fsdp": "hybrid"}, "--fsdp hybrid: use full_shard (--parallel fsdp)"),
        ({"weight_precision": "stochastic"}, "--weight_precision stochastic: the weights are float32"),
        ({"weight_precision": "bf16"}, "--weight_precision bf16: the weights are float32 without --bf16"),
        ({"weight_precision": "half"}, "--weight_precision: invalid choice: 'half'"),
        ({"max_packed_tokens": 0}, "--max_packed_tokens 0 must be at least 1"),
        ({"use_liger": True}, "--use_liger True: Liger's kernels need an NVIDIA GPU, but this run uses cpu"),
        ({"torch_compile_backend": "eager"}, "--torch_compile_backend eager: not supported"),
        ({"torch_compile_mode": "max-autotune"}, "--torch_compile_mode max-autotune: not supported"),
        ({"use_liger_kernel": True}, "use --use_liger"),
        ({"gradient_checkpointing": True}, "use --grad_checkpoint"),
        ({"use_dora": True}, "--use_dora True: has no effect without adapters; add --use_llm_lora"),
        ({"use_rslora": True}, "--use_rslora True: has no effect without adapters"),
        ({"load_in_4bit": True}, "--load_in_4bit True: has no effect without adapters"),
        (
            {"load_in_4bit": True, "use_backbone_lora": 2},
            "4-bit weights cannot be trained; add --use_llm_lora",
        ),
        (
            {"load_in_4bit": True, "use_llm_lora": 2, "parallel": "fsdp"},
            "4-bit weights cannot be sharded; use --parallel ddp, or ZeRO-1 or 2",
        ),
        (
            {"load_in_4bit": True, "use_llm_lora": 2, "cpu_offload": True},
            "4-bit weights cannot be offloaded; remove --cpu_offload True",
        ),
        (
            {"optim": "adamw_torch_8bit", "parallel": "fsdp"},
            "8-bit and 4-bit optimizer state cannot be sharded; use --parallel ddp",
        ),
        ({"freeze_backbone": True, "vision_lr": 1e-6}, "--vision_lr 1e-06: has no effect, because"),
        ({"vision_lr": -1}, "--vision_lr -1.0 must be at least 0"),
        ({"loraplus_lr_ratio": 16}, "--loraplus_lr_ratio 16: has no effect without adapters"),
        ({"loraplus_lr_ratio": 0}, "--loraplus_lr_ratio 0.0 must be above 0"),
        ({"ignore_data_skip": True}, "--ignore_data_skip True: not supported"),
    ],
)
def test_invalid_flags(start, capfd, change, message):
    code, out = start(**change)
    assert code == 2
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not out.exists()


@pytest.mark.parametrize("installed", [True, False])
def test_kernels_of_a_missing_package(start, monkeypatch, capfd, installed):
    monkeypatch.setattr("internvl_chat.train.checks.is_liger_kernel_available", lambda: installed)
    assert start(use_liger=True)[0] == 2
    error = capfd.readouterr().err
    assert ("the package liger-kernel is not installed (pip install liger-kernel)" in error) != installed
    assert "Liger's kernels need an NVIDIA GPU" in error


def test_fsdp_and_deepspeed_exclude_each_other(start, tmp_path, capfd):
    pytest.importorskip("deepspeed")
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 2}}))
    assert start(fsdp="full_shard", deepspeed=path)[0] == 2
    assert "--fsdp full_shard and --deepspeed: conflicting parallel layouts" in capfd.readouterr().err
    code, out = start(deepspeed=path, weight_precision="stochastic", bf16=True)
    assert code == 2
    error = capfd.readouterr().err
    assert (
        "--weight_precision stochastic: DeepSpeed has its own float32 master weights; remove the flag"
        in error
    )
    assert "Traceback" not in error
    assert not out.exists()


def test_separate_parts_exclude_adapters(tiny_model, sample_data, tmp_path, capfd):
    argv = flags(
        vision_path=tiny_model, llm_path=tiny_model, use_llm_lora=2, meta_path=sample_data / "train.json",
        output_dir=tmp_path / "out",
    )  # fmt: skip
    assert train(argv) == 2
    assert "adapters need a base model on disk" in capfd.readouterr().err


def test_unusable_output_folder(start, tmp_path, capfd):
    (tmp_path / "out").write_text("a file")
    assert start()[0] == 2
    assert "is a file" in capfd.readouterr().err
    assert start(output_dir=tmp_path / "out/deeper")[0] == 2
    assert "cannot be written to" in capfd.readouterr().err


def test_model_path_is_a_file(start, tiny_model, capfd):
    assert start(model_name_or_path=tiny_model / "config.json")[0] == 1
    assert "no such model folder" in capfd.readouterr().err
