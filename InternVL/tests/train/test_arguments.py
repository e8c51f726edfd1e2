"""The command line of training: the reference's flags, mistakes all at once, files instead of flags."""

import json

import pytest
import yaml
from helpers import flags

from internvl_chat.train.arguments import parse_arguments
from internvl_chat.utils.errors import UsageError

NEEDED = {"output_dir": "out", "meta_path": "meta.json", "model_name_or_path": "model"}


def parse(**values):
    return parse_arguments(flags(**{**NEEDED, **values}))


def problems(*argv) -> list[str]:
    with pytest.raises(UsageError) as caught:
        parse_arguments(list(argv))
    return caught.value.problems


def test_former_names_keep_their_meaning():
    run = parse(evaluation_strategy="no", warmup_ratio=0.03, group_by_length=True).run
    assert run.eval_strategy == "no"
    assert run.warmup_steps == 0.03
    assert run.get_warmup_steps(1000) == 30
    assert run.train_sampling_strategy == "random"


def test_three_way_flag_however_it_is_written():
    for written, meant in (
        ("auto", "auto"),
        ("true", "True"),
        ("False", "False"),
        ("1", "True"),
        (False, "False"),
    ):
        assert parse(grad_checkpoint=written).model.grad_checkpoint == meant
    assert "--grad_checkpoint maybe: must be auto, True or False" in problems(
        *flags(**{**NEEDED, "grad_checkpoint": "maybe"})
    )


def test_reference_defaults():
    args = parse()
    assert args.run.loss_reduction == "sample"
    assert args.model.lora_dropout == 0.05
    assert args.model.attn == "auto"
    assert (args.data.max_seq_length, args.data.conv_style) == (8192, "internvl2_5")


def test_step_is_what_the_trainer_gets_as_a_batch():
    run = parse(per_device_train_batch_size=2, gradient_accumulation_steps=8).run
    assert (run.records_per_pack, run.share_of_step, run.step_records) == (2, 16, 16)
    assert (run.per_device_train_batch_size, run.gradient_accumulation_steps) == (16, 1)


def test_every_mistake_is_named():
    found = problems(
        "--bf16", "perhaps", "--num_train_epochs", "many", "--attn", "magic", "--lerning_rate", "1",
        "--meta_path", "x",
    )  # fmt: skip
    text = "\n".join(found)
    for message in (
        "--bf16", "--num_train_epochs: invalid float value: 'many'", "--attn: invalid choice: 'magic'",
        "unknown flag --lerning_rate; did you mean --learning_rate?", "--output_dir is required",
        "--model_name_or_path is required",
    ):  # fmt: skip
        assert message in text
    assert len(found) == 6


def test_stray_word_is_an_error():
    assert problems(*flags(**NEEDED), "stray") == ["unexpected argument 'stray'"]


def test_abbreviations_are_not_guessed():
    assert any("--learning" in p for p in problems(*flags(**NEEDED), "--learning", "1"))


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_file_instead_of_flags(tmp_path, suffix):
    values = {**NEEDED, "use_cpu": True, "learning_rate": 3e-4, "use_llm_lora": 8, "report_to": ["none"]}
    path = tmp_path / f"run{suffix}"
    path.write_text(json.dumps(values) if suffix == ".json" else yaml.safe_dump(values))
    args = parse_arguments([str(path)])
    assert args.run.learning_rate == 3e-4
    assert args.model.use_llm_lora == 8
    assert args.data.meta_path == "meta.json"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON or YAML"),
        ("[1]", "must map flag names"),
        ('{"lerning_rate": 1}', "did you mean"),
    ],
)
def test_bad_file(tmp_path, content, message):
    path = tmp_path / "run.json"
    path.write_text(content)
    assert message in "\n".join(problems(str(path)))


def test_missing_file():
    assert "no such configuration file" in problems("nowhere.yaml")[0]


def test_resolved_arguments_hold_no_secret():
    args = parse(hub_token="hf_secret")
    text = yaml.safe_dump(args.to_dict())
    assert "hf_secret" not in text
    resolved = args.to_dict()["training"]
    assert resolved["per_device_train_batch_size"] * resolved["gradient_accumulation_steps"] == 8
