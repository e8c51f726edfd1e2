"""The command `m3llm`: JSON output, help and exit codes."""

import hashlib
import json

import pytest

from internvl_chat.cli import build_parser
from internvl_chat.cli import main as m3llm
from internvl_chat.data.encode.encoder import RecordEncoder
from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.data.encode.tokenizer import load_tokenizer
from internvl_chat.data.record_set import RecordSet
from internvl_chat.data.sources.meta import load_meta
from internvl_chat.model.io.folders import read_config

COMMANDS = [
    "train",
    "data check",
    "data inspect",
    "data browse",
    "data shard",
    "loss",
    "eval",
    "eval compare",
    "generate",
    "chat",
    "web",
    "serve",
    "merge",
    "export",
    "parity",
    "plan",
    "report",
    "doctor",
    "sample-data",
    "tiny-model",
]


@pytest.fixture
def rows(capfd):
    """Return a function that runs a command with --json and returns the exit code and the printed objects."""

    def run(*argv):
        capfd.readouterr()
        code = m3llm([str(a) for a in argv])
        return code, [json.loads(line) for line in capfd.readouterr().out.splitlines()]

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command, capfd):
    with pytest.raises(SystemExit) as stop:
        m3llm([*command.split(), "--help"])
    assert stop.value.code == 0
    assert f"Example: m3llm {command}" in capfd.readouterr().out.replace("\n", " ")


def test_ctrl_c_ends_a_command_without_a_traceback(monkeypatch, capfd):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("internvl_chat.commands.doctor.run", interrupted)
    assert m3llm(["doctor"]) == 130
    assert capfd.readouterr().err == ""


def test_help_of_train_lists_the_reference_flags(capfd):
    with pytest.raises(SystemExit) as stop:
        m3llm(["train", "--help"])
    assert stop.value.code == 0
    text = capfd.readouterr().out
    for flag in [
        "model_name_or_path",
        "conv_style",
        "use_fast_tokenizer",
        "output_dir",
        "meta_path",
        "overwrite_output_dir",
        "force_image_size",
        "max_dynamic_patch",
        "min_dynamic_patch",
        "down_sample_ratio",
        "drop_path_rate",
        "freeze_llm",
        "freeze_mlp",
        "freeze_backbone",
        "unfreeze_vit_layers",
        "unfreeze_lm_head",
        "use_llm_lora",
        "use_backbone_lora",
        "vision_select_layer",
        "dataloader_num_workers",
        "bf16",
        "num_train_epochs",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "evaluation_strategy",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "learning_rate",
        "weight_decay",
        "warmup_ratio",
        "lr_scheduler_type",
        "logging_steps",
        "max_seq_length",
        "do_train",
        "grad_checkpoint",
        "group_by_length",
        "dynamic_image_size",
        "use_thumbnail",
        "ps_version",
        "pad2square",
        "normalize_type",
        "use_data_resampling",
        "loss_reduction",
        "deepspeed",
        "report_to",
        "vision_path",
        "llm_path",
        "mlp_path",
    ]:
        assert f"--{flag}" in text, flag


def test_inspect(rows, sample_data, tiny_model):
    code, found = rows(
        "data", "inspect", sample_data / "train.json", "--model", tiny_model, "--json", "--ids", "--limit", 2,
        "--max_dynamic_patch", 3,
    )  # fmt: skip
    assert code == 0
    specs = load_meta(sample_data / "train.json", sample_data)
    assert [(r["dataset"], r["index"]) for r in found] == [(s.name, i) for s in specs for i in range(2)]
    tokenizer, _ = load_tokenizer(tiny_model)
    preprocessing = Preprocessing.from_folder(tiny_model, read_config(tiny_model))
    encoder = RecordEncoder(tokenizer, preprocessing.with_tile_limit(3))
    for row in found:
        spec = next(s for s in specs if s.name == row["dataset"])
        sample = RecordSet(spec, encoder).load(row["index"])
        assert row["id"] == sample.id
        assert row["input_ids"] == sample.encoded.input_ids.tolist()
        assert row["labels"] == sample.encoded.labels.tolist()
        assert row["num_tokens"] == len(row["input_ids"])
        assert row["num_supervised"] == sum(label != -100 for label in row["labels"])
        assert row["num_tiles"] == sum(row["tiles"]) == len(sample.tiles)
        assert row["tiles_u8"] == hashlib.sha256(sample.tiles.numpy().tobytes()).hexdigest()[:16]
        answer = json.loads(spec.annotation.read_text().splitlines()[row["index"]])["conversations"][1][
            "value"
        ]
        assert row["supervised"] == [f"{answer}<|im_end|>"]


def test_inspect_needs_no_weights(rows, sample_data, tiny_model, tmp_path):
    for file in tiny_model.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    code, found = rows(
        "data", "inspect", sample_data / "train.json", "--model", tmp_path, "--json", "--limit", 1
    )
    assert code == 0
    assert len(found) == 6
    assert "input_ids" not in found[0]


def test_inspect_as_text(capfd, sample_data, tiny_model):
    assert (
        m3llm(
            ["data", "inspect", str(sample_data / "train.json"), "--model", str(tiny_model), "--limit", "1"]
        )
        == 0
    )
    assert "supervised: '" in capfd.readouterr().out


def test_loss(rows, sample_data, tiny_model):
    code, found = rows("loss", sample_data / "held_out.json", "--model", tiny_model, "--json", "--limit", 1)
    assert code == 0
    records, summary = found[:6], found[6:]
    assert all(set(r) == {"dataset", "index", "id", "loss", "num_supervised"} for r in records)
    assert [r["dataset"] for r in summary] == [*(r["dataset"] for r in records), "all"]
    assert [r["records"] for r in summary] == [1] * 6 + [6]
    assert [r["loss"] for r in summary[:6]] == [r["loss"] for r in records]
    assert summary[6]["loss"] == pytest.approx(sum(r["loss"] for r in records) / 6)


def test_eval(rows, sample_data, tiny_model):
    code, found = rows("eval", sample_data / "held_out.json", "--model", tiny_model, "--json",
                       "--max_new_tokens", 4, "--require-above-chance", 0.01)  # fmt: skip
    answers, sets, [test] = found[:12], found[12:18], found[18:]
    assert {r["dataset"] for r in answers} == {r["dataset"] for r in sets}
    assert all(r["records"] == 2 for r in sets)
    assert test["questions"] == sum(bool(r["choices"]) for r in answers)
    assert code == 1  # random weights do not beat chance


def test_eval_fails_if_not_above_chance(capfd, sample_data, tiny_model):
    argv = ["eval", str(sample_data / "held_out.json"), "--model", str(tiny_model), "--max_new_tokens", "2"]
    assert m3llm([*argv, "--limit", "1", "--require-above-chance", "0.01"]) == 1
    assert "not above chance" in capfd.readouterr().err
    assert m3llm([*argv, "--limit", "1"]) == 0


def test_generate(rows, sample_data, tiny_model):
    figure = next((sample_data / "images").glob("*_fig1.jpg"))
    images = ("--image", figure, "--image", figure)
    code, [row] = rows("generate", "--model", tiny_model, *images, "What?", "--json", "--max_new_tokens", 5)
    assert code == 0
    assert isinstance(row["answer"], str)


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (
            ["generate", "--model", "TINY", "--image", "/no/such.jpg", "What?"],
            1,
            "the image /no/such.jpg does not exist",
        ),
        (["generate", "--model", "/no/model", "What?"], 1, "no such model folder"),
        (["loss", "/no/meta.json", "--model", "TINY"], 1, "no such meta file"),
        (["sample-data", "TINY"], 2, "not an empty folder"),
        (["tiny-model", "TINY", "--text", "TINY"], 2, "choose a different folder"),
        (["merge", "TINY", "TINY/tokenizer.json"], 1, "is a file"),
    ],
)
def test_user_errors(argv, code, message, tiny_model, capfd):
    assert m3llm([a.replace("TINY", str(tiny_model)) for a in argv]) == code
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_unknown_command_or_flag_is_a_usage_error():
    for argv in (["no-such"], ["loss", "meta.json"], ["loss", "meta.json", "--model", "x", "--limit", "0"]):
        with pytest.raises(SystemExit) as stop:
            m3llm(argv)
        assert stop.value.code == 2


def test_parser_knows_every_command():
    text = build_parser().format_help()
    assert all(command.split()[0] in text for command in [*COMMANDS, "train"])
