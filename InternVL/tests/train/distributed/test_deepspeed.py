"""The DeepSpeed configuration must agree with the flags."""

import json

import pytest
from helpers import flags

from internvl_chat.train.arguments import parse_arguments
from internvl_chat.train.distributed.deepspeed import resolve_deepspeed
from internvl_chat.utils.errors import UsageError

ZERO_2 = {"zero_optimization": {"stage": 2}}
BATCH = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 4,
    "train_batch_size": 8,
    "gradient_clipping": 1.0,
}


def resolve(**config):
    run = parse_arguments(
        flags(
            output_dir="out", meta_path="meta.json", model_name_or_path="model",
            per_device_train_batch_size=2, gradient_accumulation_steps=4, deepspeed=json.dumps(config),
        )
    ).run  # fmt: skip
    return resolve_deepspeed(run, hidden_size=8)


def problems(**config) -> list[str]:
    with pytest.raises(UsageError) as caught:
        resolve(**config)
    return caught.value.problems


@pytest.mark.parametrize("given", [{}, dict.fromkeys(BATCH, "auto"), BATCH], ids=["none", "auto", "same"])
def test_records_of_a_rank_are_one_batch(given):
    found = resolve(**ZERO_2, **given)
    assert {name: found[name] for name in BATCH} == {
        "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 1, "train_batch_size": 8,
        "gradient_clipping": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize("name", BATCH)
def test_contradictions_with_the_flags_are_refused(name):
    assert problems(**ZERO_2, **{**BATCH, name: 16}) == [
        f'--deepspeed: "{name}" is 16, but the flags set {BATCH[name]!r}; use "auto"'
    ]


@pytest.mark.parametrize(
    ("config", "stage"),
    [
        ({}, 0),
        ({"zero_optimization": {"stage": 0}}, 0),
        ({"zero_optimization": False}, 0),
        ({"zero_optimization": {"stage": 4}}, 4),
    ],
)
def test_unsupported_zero_stages_are_refused(config, stage):
    (problem,) = problems(**config)
    assert problem == (
        f'--deepspeed: "zero_optimization.stage" is {stage}, but must be 1, 2 or 3; to train '
        "without ZeRO, use --parallel ddp instead of --deepspeed"
    )
