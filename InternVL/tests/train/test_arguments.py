"""The training command line: flags of the reference, error reporting, and configuration files."""

import dataclasses
import json
import logging
import os

import pytest
import torch
import yaml
from helpers import flags
from transformers import TrainingArguments

from internvl_chat.train.arguments import dump_config, parse_arguments
from internvl_chat.train.flag_help import FlagHelp, flag_groups
from internvl_chat.train.flags import RANGES, RunArguments
from internvl_chat.train.refused_flags import OTHER_PROJECTS, REFUSED_FLAGS
from internvl_chat.utils.errors import UsageError

FLAGS = {flag.name: flag for group in flag_groups().values() for flag in group}
NEEDED = {"output_dir": "out", "meta_path": "meta.json", "model_name_or_path": "model"}


def parse(**values):
    return parse_arguments(flags(**{**NEEDED, **values}))


def problems(*argv) -> list[str]:
    with pytest.raises(UsageError) as caught:
        parse_arguments(list(argv))
    return caught.value.problems


def test_former_flag_names():
    run = parse(evaluation_strategy="no", warmup_ratio=0.03, group_by_length=True).run
    assert run.eval_strategy == "no"
    assert run.warmup_steps == 0.03
    assert run.train_sampling_strategy == "random"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--warmup_steps 100", 100),
        ("--warmup_ratio 0.03", 0.03),
        ("--warmup_ratio 0.03 --warmup_steps 8", 8),
        ("--warmup_ratio 0.03 --warmup-steps=0", 0),
        ("--warmup_steps 8 --warmup_ratio 0.1", 0.1),
    ],
)
def test_the_later_flag_for_warmup_is_used(words, expected, caplog):
    """Launchers set --warmup_ratio; flags after the launcher's name come later."""
    logging.getLogger("internvl_chat").propagate = True
    with caplog.at_level(logging.INFO):
        assert parse_arguments([*flags(**NEEDED), *words.split()]).run.warmup_steps == expected
    assert ("is ignored, because" in caplog.text) == (words.count("--") == 2)


def test_later_flags_replace_former_names():
    needed = flags(**NEEDED)
    run = parse_arguments([*needed, "--eval_strategy", "steps", "--evaluation_strategy", "no"]).run
    assert run.eval_strategy == "no"
    run = parse_arguments([*needed, "--evaluation_strategy", "no", "--eval_strategy", "epoch"]).run
    assert run.eval_strategy == "epoch"
    assert not parse_arguments([*needed, "--sanity_check", "--self_test", "False"]).run.sanity_check
    parts = ["--vision_path", "vit", "--llm_path", "llm"]
    assert parse_arguments([*needed, *parts]).model.model_name_or_path is None
    assert parse_arguments([*parts, *needed]).model.vision_path is None


@pytest.mark.parametrize(
    ("recipe", "words", "expected"),
    [
        ({"warmup_steps": 100}, "--warmup_ratio 0.1", {"warmup_steps": 0.1}),
        ({"warmup_ratio": 0.1}, "--warmup_steps 0", {"warmup_steps": 0}),
        ({"warmup_ratio": 0.1, "warmup_steps": 5}, "--seed 1", {"warmup_steps": 5}),
        ({"max_steps": 7}, "--num_train_epochs 2", {"max_steps": -1, "num_train_epochs": 2}),
        ({"max_steps": 7}, "--num_train_epochs 2 --max_steps 3", {"max_steps": 3}),
        ({"num_train_epochs": 2}, "--max_steps 3", {"max_steps": 3}),
        ({"eval_strategy": "steps"}, "--evaluation_strategy no", {"eval_strategy": "no"}),
    ],
)
def test_flags_replace_those_of_a_recipe_with_the_same_meaning(tmp_path, recipe, words, expected):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**NEEDED, "use_cpu": True, **recipe}))
    run = parse_arguments([str(path), *words.split()]).run
    assert {name: getattr(run, name) for name in expected} == expected


def test_steps_between_validations_default_to_those_between_checkpoints():
    assert parse(save_steps=7, logging_steps=3).run.eval_steps == 7
    assert parse(save_steps=7, eval_steps=5).run.eval_steps == 5


@pytest.mark.parametrize(
    "words", [["wandb", "tensorboard"], ["wandb,tensorboard"], ["wandb, tensorboard"], ["wandb tensorboard"]]
)
def test_multiple_trackers(words, tmp_path):
    run = parse_arguments(
        [*flags(**NEEDED, report_to=None), "--report_to", "none", "--report_to", *words]
    ).run
    assert run.report_to == ("wandb", "tensorboard")
    for given in (words, words[0] if len(words) == 1 else words):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({**NEEDED, "use_cpu": True, "report_to": given}))
        assert parse_arguments([str(path)]).run.report_to == ("wandb", "tensorboard")


def test_duplicate_trackers_and_none():
    assert parse(report_to="wandb,wandb").run.report_to == ("wandb",)
    assert "--report_to none wandb: none cannot be combined with trackers" in problems(
        *flags(**NEEDED, report_to="none wandb")
    )


def test_no_tracker():
    assert parse(report_to=None).run.report_to == parse(report_to="none").run.report_to == ()


@pytest.fixture
def gpus(monkeypatch):
    """Simulate a number of GPUs and local ranks."""

    def see(count: int, ranks: int = 1) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))

    return see


def test_device(gpus, monkeypatch):
    gpus(2, ranks=2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert parse(use_cpu=None).run.device == torch.device("cuda", 1)
    assert parse(use_cpu=True).run.device == torch.device("cpu")


def test_cpu_is_used_only_on_request(gpus):
    gpus(0)
    assert parse(use_cpu=True).run.device == torch.device("cpu")
    (problem,) = problems(*flags(**NEEDED, use_cpu=None))
    assert "no GPU is available; train on the CPU with GPUS=0 (--use_cpu True" in problem


@pytest.mark.parametrize(("seen", "shown"), [(1, "1 GPU is visible"), (2, "2 GPUs are visible")])
def test_more_ranks_than_gpus(gpus, monkeypatch, seen, shown):
    """All ranks of the node raise; only the error of rank 0 is shown."""
    gpus(seen, ranks=4)
    for rank in range(4):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert problems(*flags(**NEEDED, use_cpu=None))[0].startswith(f"GPUS=4, but {shown}; lower GPUS")


def test_ddp_backend(gpus):
    gpus(1)
    assert parse(use_cpu=None, ddp_backend="nccl").run.device.type == "cuda"
    assert parse(use_cpu=True, ddp_backend="gloo").run.device.type == "cpu"
    for use_cpu, given, used in ((None, "gloo", "nccl"), (True, "nccl", "gloo"), (True, "mpi", "gloo")):
        assert problems(*flags(**NEEDED | {"use_cpu": use_cpu}, ddp_backend=given)) == [
            f"--ddp_backend {given}: not supported; use {used} or remove the flag"
        ]


def test_spellings_of_grad_checkpoint():
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


def test_records_per_step(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    run = parse(per_device_train_batch_size=2, gradient_accumulation_steps=8).run
    assert (run.records_per_pack, run.records_per_rank, run.records_per_step) == (2, 16, 64)


@pytest.mark.parametrize(("ranks", "per_rank"), [("1", 16), ("3", 6), ("4", 4), ("16", 1)])
def test_global_batch_size_does_not_depend_on_the_ranks(monkeypatch, ranks, per_rank):
    monkeypatch.setenv("WORLD_SIZE", ranks)
    run = parse(per_device_train_batch_size=2, global_batch_size=16).run
    assert (run.records_per_pack, run.records_per_rank, run.records_per_step) == (2, per_rank, 16)


def test_invalid_global_batch_sizes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    given = {**NEEDED, "gradient_accumulation_steps": 4, "global_batch_size": 2, "deepspeed": "{}"}
    found = "\n".join(problems(*flags(**given)))
    assert "--gradient_accumulation_steps and --global_batch_size: both set the batch size" in found
    assert "--global_batch_size 2: each of the 3 ranks needs at least one record per step" in found
    assert "--global_batch_size 2: with DeepSpeed, it must be divisible by the 3 ranks" in found
    assert "--global_batch_size 0 must be at least 1" in problems(*flags(**NEEDED, global_batch_size=0))


def test_batch_size_on_the_command_line_replaces_that_of_a_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("gradient_accumulation_steps: 16\n")
    assert parse_arguments([str(file), *flags(**NEEDED, global_batch_size=6)]).run.records_per_step == 6
    file.write_text("global_batch_size: 6\n")
    run = parse_arguments([str(file), *flags(**NEEDED, gradient_accumulation_steps=2)]).run
    assert run.records_per_step == 2 * run.records_per_pack


TRANSFORMERS = {field.name: field for field in dataclasses.fields(TrainingArguments)}
OWN_DEFAULTS = {
    # transformers leaves these to its Trainer.
    "do_train": True,
}
# Flags with a different type here: JSON text instead of a dict, 0 instead of None.
OWN_TYPES = ("deepspeed", "lr_scheduler_kwargs", "fsdp", "report_to", "warmup_steps", "warmup_ratio")


def default_of(field: dataclasses.Field):
    """Return the default of a field; for an enum member, its value."""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return getattr(value, "value", value)


def test_every_flag_of_transformers_is_supported_or_rejected():
    """Fails if a newer transformers adds flags, which must be supported or rejected."""
    used = {field.name for field in dataclasses.fields(RunArguments)}
    assert not used & REFUSED_FLAGS.keys()
    assert TRANSFORMERS.keys() <= used | REFUSED_FLAGS.keys()


def test_flags_of_transformers_keep_its_types_and_defaults():
    known = [flag for flags in flag_groups().values() for flag in flags]
    shared = [flag for flag in known if flag.name in TRANSFORMERS and flag.name not in OWN_TYPES]
    assert len(shared) > 40
    for flag in shared:
        theirs = TRANSFORMERS[flag.name]
        assert flag.type in str(theirs.type), flag.name
        assert flag.default == OWN_DEFAULTS.get(flag.name, default_of(theirs)), flag.name


@pytest.mark.parametrize("flag", sorted(REFUSED_FLAGS))
def test_flags_without_effect_are_rejected(flag):
    [problem] = problems(*flags(**NEEDED), f"--{flag}", "something else")
    assert problem.startswith(f"--{flag} something else: not supported; ")
    for value in REFUSED_FLAGS[flag][0]:
        assert parse(**{flag: value}) == parse()
    if flag in TRANSFORMERS:
        assert default_of(TRANSFORMERS[flag]) in REFUSED_FLAGS[flag][0]


def test_spellings_of_rejected_flags():
    needed = flags(**NEEDED)
    for accepted in (["--fp16=False"], ["--fp16", "no"], ["--label-smoothing-factor", "0"]):
        assert parse_arguments([*accepted, *needed]) == parse()
    for rejected in (["--fp16"], ["--fp16=True"], ["--no_skip_memory_metrics"], ["--label_names", "a", "b"]):
        name = rejected[0].partition("=")[0].replace("--no_", "--")
        [problem] = problems(*rejected, *needed)
        assert problem.startswith(f"{name} ")
    assert len(problems("--fp16", "--hub_token=x", "--bf16", "perhaps", *needed)) == 3


def test_configuration_is_frozen():
    config = parse()
    for part in (config, config.model, config.data, config.run):
        with pytest.raises(dataclasses.FrozenInstanceError):
            part.seed = 1


def test_parsing_initializes_no_devices(monkeypatch):
    """TrainingArguments itself would initialize devices and set environment variables."""
    monkeypatch.setattr("os.environ", before := dict(os.environ))
    parse(deepspeed='{"zero_optimization": {"stage": 2}}', bf16=True, torch_compile=True)
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("values", "mode"),
    [
        ({}, "auto"),
        ({"parallel": "ddp"}, "ddp"),
        ({"fsdp": "full_shard"}, "fsdp"),
        ({"fsdp": "full_shard auto_wrap", "parallel": "fsdp"}, "fsdp"),
        ({"fsdp": "hybrid_shard"}, "hsdp"),
        ({"parallel": "hsdp"}, "hsdp"),
        ({"fsdp": "full_shard offload"}, "fsdp"),
        ({"fsdp": "offload hybrid_shard auto_wrap"}, "hsdp"),
        ({"cpu_offload": True}, "fsdp"),
        ({"deepspeed": '{"zero_optimization": {"stage": 3}}'}, "deepspeed"),
    ],
)
def test_parallel_mode(values, mode):
    run = parse(**values).run
    assert run.parallel == mode
    assert run.cpu_offload == ("offload" in str(values))


def test_hsdp_on_a_single_node_is_fsdp(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    for local, expected in (("2", "hsdp"), ("4", "fsdp")):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        assert parse(parallel="hsdp").run.parallel == expected


def test_offload_is_supported_only_with_fsdp():
    assert problems(*flags(**NEEDED, cpu_offload=True, parallel="ddp")) == [
        "--cpu_offload True: not supported with --parallel ddp; use --parallel fsdp"
    ]
    [problem] = problems(*flags(**NEEDED, cpu_offload=True, deepspeed='{"zero_optimization": {"stage": 3}}'))
    assert "set offload_optimizer and offload_param in the DeepSpeed configuration" in problem


def test_conflicting_parallelism():
    both = problems(*flags(**NEEDED, fsdp="full_shard", parallel="ddp"))
    assert both == ["--fsdp full_shard and --parallel ddp: conflicting parallel layouts; use one of them"]
    [words] = problems(*flags(**NEEDED, fsdp="full_shard hybrid_shard"))
    assert words.startswith("--fsdp full_shard and --fsdp hybrid_shard: conflicting parallel layouts")
    alone = problems(*flags(**NEEDED, parallel="deepspeed"))
    assert alone == ["--parallel deepspeed needs --deepspeed with a ZeRO configuration"]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("shard_grad_op", "shard_grad_op"),
        ("full_shard hybrid_shard_zero2", "hybrid_shard_zero2"),
        ("auto_wrap", "auto_wrap"),
    ],
)
def test_unsupported_fsdp_values(given, named):
    [problem] = problems(*flags(**NEEDED, fsdp=given))
    assert problem.startswith(f"--fsdp {named}: use full_shard (--parallel fsdp) or hybrid_shard")


def test_former_flags_still_work(caplog):
    logging.getLogger("internvl_chat").propagate = True
    run = parse(self_test=True, weight_precision="auto").run
    assert run.sanity_check
    assert run.weight_precision == "master"
    assert "auto is deprecated; use master" in caplog.text


def test_json_flags(tmp_path):
    file = tmp_path / "zero.json"
    file.write_text('{"zero_optimization": {"stage": 1}}')
    run = parse(deepspeed=file, lr_scheduler_kwargs='{"num_cycles": 2}').run
    assert run.deepspeed == {"zero_optimization": {"stage": 1}}
    assert run.lr_scheduler_kwargs == {"num_cycles": 2}
    assert "cannot be read" in problems(*flags(**NEEDED, deepspeed=tmp_path / "none.json"))[0]
    assert "not valid JSON" in problems(*flags(**NEEDED, lr_scheduler_kwargs="{"))[0]


def test_all_errors_are_reported():
    found = problems(
        "--bf16", "perhaps", "--num_train_epochs", "many", "--attn", "magic", "--lerning_rate", "1",
        "--meta_path", "x", "--use_cpu", "--weight_decay", "-1", "--optim", "lomo", "--report_to", "pigeon",
        "--lr_scheduler_kwargs", "{", "--lora_rank", "4", "--fp16",
    )  # fmt: skip
    text = "\n".join(found)
    for message in (
        "--bf16", "--num_train_epochs: invalid float value: 'many'", "--attn: invalid choice: 'magic'",
        "unknown flag --lerning_rate; did you mean --learning_rate?", "--output_dir is required",
        "--model_name_or_path is required", "--weight_decay -1.0 must be at least 0",
        "--optim lomo: not supported",
        "--report_to pigeon: unknown", "--lr_scheduler_kwargs {: not valid JSON",
        "unknown flag --lora_rank; did you mean --use_llm_lora?", "--fp16 True: not supported",
    ):  # fmt: skip
        assert message in text
    assert len(found) == 12


NUMBERS = {name: flag for name, flag in FLAGS.items() if flag.type in ("int", "float")}
# Flags that accept negative numbers.
MAY_BE_NEGATIVE = {"max_steps", "local_rank", "vision_select_layer", "unfreeze_vit_layers"}


def test_every_numeric_flag_has_a_range():
    assert RANGES.keys() == NUMBERS.keys()
    defaults = {name: flag.default for name, flag in NUMBERS.items() if flag.default is not None}
    assert parse(**defaults)


@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_numbers_outside_the_range_of_their_flag(value):
    names = NUMBERS.keys() - {"warmup_ratio", "global_batch_size"}  # these replace other flags
    rejected = names - (MAY_BE_NEGATIVE if value == "-1" else set())
    words = [word for name in names for word in (f"--{name}", value)]
    found = problems(*flags(**NEEDED), *words)
    for name in rejected:
        assert sum(problem.startswith((f"--{name} {value}", f"--{name}: ")) for problem in found) == 1, name
    assert len(found) == len(rejected)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("adam_beta1", 1, "1.0 must be at least 0 and below 1"),
        ("warmup_ratio", "nan", "nan must be a finite number"),
        ("warmup_ratio", -1, "-1.0 must be at least 0 and below 1"),
        ("lora_dropout", 1.5, "1.5 must be at least 0 and below 1"),
        ("down_sample_ratio", 0, "0.0 must be above 0 and at most 1"),
        ("seed", 2**32, "4294967296 must be at least 0 and at most 4294967295"),
        ("dataloader_prefetch_factor", 0, "0 must be at least 1"),
        ("save_total_limit", 0, "0 must be at least 1"),
        ("num_train_epochs", "inf", "inf must be a finite number"),
        ("max_steps", -2, "-2 must be at least -1"),
        ("max_bad_fraction", 1.01, "1.01 must be at least 0 and at most 1"),
    ],
)
def test_bounds_of_numbers(flag, value, message):
    assert problems(*flags(**{**NEEDED, flag: value})) == [f"--{flag} {message}"]


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("lora_r", "did you mean --use_llm_lora?"),
        ("lora-rank", "did you mean --use_llm_lora?"),
        ("batch_size", "did you mean --per_device_train_batch_size?"),
        ("lr", "did you mean --learning_rate?"),
        ("epochs", "did you mean --num_train_epochs?"),
        ("gradient_accumulation", "did you mean --gradient_accumulation_steps?"),
        ("max_length", "did you mean --max_seq_length?"),
        ("model", "did you mean --model_name_or_path?"),
        ("data", "did you mean --meta_path?"),
        ("output", "did you mean --output_dir?"),
        ("deepspeed_config", "did you mean --deepspeed?"),
        ("freeze_vit", "did you mean --freeze_backbone?"),
        ("qlora", "did you mean --load_in_4bit?"),
        ("load_in_8bit", "weights can be quantized to 4 bits only: --load_in_4bit"),
        ("aligner_lr", "did you mean --projector_lr?"),
        ("lora_alpha", "alpha is twice the rank of --use_llm_lora"),
        ("config", "a configuration file comes first: m3llm train FILE --FLAG VALUE"),
    ],
)
def test_names_of_other_projects(name, advice):
    assert problems(*flags(**NEEDED), f"--{name}", "1") == [f"unknown flag --{name}; {advice}"]


def test_names_of_other_projects_are_not_ours():
    assert not OTHER_PROJECTS.keys() & (FLAGS.keys() | REFUSED_FLAGS.keys())
    for text in OTHER_PROJECTS.values():
        named = text.removeprefix("did you mean --").removesuffix("?")
        assert named == text or named in FLAGS


def test_positional_argument_is_an_error():
    assert problems(*flags(**NEEDED), "stray") == ["unexpected argument 'stray'"]
    [problem] = problems(*flags(**NEEDED), "recipe.yaml")
    assert problem.endswith("; a configuration file comes first: m3llm train FILE --FLAG VALUE")


def test_abbreviations_are_not_accepted():
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


def test_flags_override_the_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**NEEDED, "use_cpu": True, "max_steps": 7, "report_to": ["wandb"]}))
    run = parse_arguments([str(path), "--max_steps", "2", "--report_to", "none"]).run
    assert (run.max_steps, run.report_to) == (2, ())
    assert "unknown flag --max_stepz" in problems(str(path), "--max_stepz", "2")[0]


TEXTS = {
    "grad_checkpoint": "False", "lr_scheduler_type": "cosine", "optim": "adafactor", "optim_args": "a=1,b=no",
    "lr_scheduler_kwargs": '{"num_cycles": 2}', "deepspeed": '{"zero_optimization": {"stage": 2}}',
    "fsdp": "full_shard", "parallel": "ddp", "ddp_backend": "gloo", "evaluation_strategy": "steps",
    "report_to": ["wandb", "tensorboard"],
}  # fmt: skip


def other_value(flag: FlagHelp):
    """Return a value other than the default."""
    if flag.type == "bool":
        return not flag.default
    if flag.type in ("int", "float"):
        return 3 if flag.type == "int" else 0.25
    if flag.name in TEXTS:
        return TEXTS[flag.name]
    return next((choice for choice in flag.choices if choice != flag.default), "some: text")


@pytest.mark.parametrize(
    "name", [n for n, flag in FLAGS.items() if len(flag.choices) != 1 and n != "use_cpu"]
)
def test_config_file_contains_changed_flags_and_reproduces_the_configuration(name, tmp_path):
    shown = NEEDED | {"use_cpu": True, name: other_value(FLAGS[name])}
    words = []
    for flag, value in shown.items():
        words += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    config = parse_arguments(words)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert yaml.safe_load(path.read_text()) == shown
    assert parse_arguments([str(path)]) == config
    assert "1 rank on cpu, " in path.read_text()


def test_no_and_off_are_text_in_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "output_dir: out\nmeta_path: meta.json\nmodel_name_or_path: model\nuse_cpu: true\n"
        "eval_strategy: no\ncheck: off\npacking: no\ngroup_by_length: True\n"
    )
    config = parse_arguments([str(path)])
    assert (config.run.eval_strategy, config.data.check, config.run.packing) == ("no", "off", False)


def recipe(folder, *lines: str) -> str:
    """Write a recipe with the needed flags and these lines."""
    path = folder / "recipe.yaml"
    path.write_text(
        "\n".join([*(f"{name}: {value}" for name, value in NEEDED.items()), "use_cpu: true", *lines])
    )
    return str(path)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["warmup_steps: 4", "warmup_ratio: 0.0"], {"warmup_steps": 0}),
        (["warmup_ratio: 0.03", "warmup_steps: 0"], {"warmup_steps": 0}),
        (["warmup_steps: 0", "warmup_ratio: 0.03"], {"warmup_steps": 0.03}),
        (["eval_strategy: steps", "evaluation_strategy: 'no'"], {"eval_strategy": "no"}),
        (["evaluation_strategy: 'no'", "eval_strategy: steps"], {"eval_strategy": "steps"}),
        (["self_test: true", "sanity_check: false"], {"sanity_check": False}),
    ],
    ids=str,
)
def test_the_later_line_of_a_recipe_is_used(tmp_path, lines, expected):
    run = parse_arguments([recipe(tmp_path, *lines)]).run
    assert {name: getattr(run, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (v, v)
        for v in ("20251126_01", "2025_11_26", "007", "1:30", "1e3", "1.10", "0x10", "true-color", "Falsey")
    ]
    + [("2025-11-26", "2025-11-26"), ("+1", "+1"), ("'null'", "null"), ("null", None)],
)
def test_text_flags_keep_the_text_of_a_recipe(tmp_path, value, text):
    assert parse_arguments([recipe(tmp_path, f"run_name: {value}")]).run.run_name == text


@pytest.mark.parametrize(
    ("line", "name", "number"),
    [
        ("use_llm_lora: 010", "use_llm_lora", 10), ("max_steps: 1_000", "max_steps", 1000),
        ("learning_rate: 1e-5", "learning_rate", 1e-5), ("weight_decay: .5", "weight_decay", 0.5),
        ("max_steps: 1:30", "max_steps", None), ("seed: 0x10", "seed", None),
        ("learning_rate: .inf", "learning_rate", None),
    ],
)  # fmt: skip
def test_numbers_of_a_recipe_are_read_like_flags(tmp_path, line, name, number):
    if number is None:
        assert f"--{name}" in problems(recipe(tmp_path, line))[0]
    else:
        config = parse_arguments([recipe(tmp_path, line)])
        assert {**vars(config.model), **vars(config.run)}[name] == number


def test_nested_numbers_of_a_recipe(tmp_path):
    lines = ["lr_scheduler_type: cosine", "lr_scheduler_kwargs: {num_cycles: .5, steps: 010, a: ['1', 2e0]}"]
    run = parse_arguments([recipe(tmp_path, *lines)]).run
    assert run.lr_scheduler_kwargs == {"num_cycles": 0.5, "steps": 10, "a": ["1", 2.0]}


@pytest.mark.parametrize(
    "lines",
    [
        ["seed: 1", "seed: 2"], ["seed: 1", "seed: 1"], ['"seed": 1', "seed: 2"],
        ["train-seed: 1", "train_seed: 2"],
        ["lr_scheduler_kwargs: {seed: 1, seed: 2}"], ["model:", "  seed: 1", "  seed: 2"],
        ["seed: 1", "training: {seed: 2}"],
        ["""lr_scheduler_kwargs: '{"seed": 1, "seed": 2}'"""],
    ],
)  # fmt: skip
def test_duplicate_keys_are_errors(tmp_path, lines):
    [problem] = problems(recipe(tmp_path, *lines))
    assert "duplicate key" in problem and "seed" in problem


def test_merged_mappings_of_a_recipe(tmp_path):
    lines = ["<<: {seed: 3, max_steps: 2}", "max_steps: 4"]
    run = parse_arguments([recipe(tmp_path, *lines)]).run
    assert (run.flags["seed"], run.max_steps) == (3, 4)


def test_zero_steps_between_validations_is_not_the_default():
    assert parse(eval_steps=0).run.eval_steps == 0


@pytest.mark.parametrize(
    "values", [{"warmup_steps": 9}, {"warmup_ratio": 0.1}, {"sanity_check": True}], ids=str
)
def test_older_config_file_with_groups(tmp_path, values):
    """It contains all flags, including the defaults of alternative flags."""
    config = parse(learning_rate=3e-4, use_llm_lora=8, packing=False, **values)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
    assert parse_arguments([str(path)]).run.warmup_steps == config.run.warmup_steps
    loaded = parse_arguments([str(path)])
    assert (loaded.run.sanity_check, loaded.run.packing) == (config.run.sanity_check, False)
    assert (loaded.model, loaded.data) == (config.model, config.data)


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


def test_resolved_arguments_contain_no_secret():
    rejected = problems(*flags(**NEEDED, hub_token="hf_secret"))
    assert rejected[0].startswith("--hub_token")
    flags_of_run = parse().to_dict()["training"]
    assert "hub_token" not in flags_of_run
    assert flags_of_run["per_device_train_batch_size"] == 8
