"""A multi-rank run matches a single-rank run with the same global batch, for every parallel layout."""

import json

import pytest
from helpers import SOURCE_ROOT, flags
from ranks import run_training

from internvl_chat.model.io.weights import open_weights
from internvl_chat.train.internvl_chat_finetune import main as train_here

THREE_STEPS = {"num_train_epochs": 1, "save_strategy": "no", "max_grad_norm": 0.5}
LORA = {"use_llm_lora": 4, "freeze_llm": True, "lora_dropout": 0}
DEEPSPEED = SOURCE_ROOT / "internvl_chat/shell/deepspeed"
LAYOUTS = {
    "ddp": {"parallel": "ddp"},
    "fsdp": {"parallel": "fsdp"},
    **{f"zero{stage}": {"deepspeed": DEEPSPEED / f"zero{stage}.json"} for stage in (1, 2, 3)},
}
# Losses differ only in the summation order.
TOLERANCE = 1e-5


def train(metrics, tiny_model, sample_data, folder, ranks, **values) -> list[dict]:
    """Train and return the rows of `metrics.jsonl`; steps have 10 of the 24 records, the last step has 4."""
    records = {1: (5, 2), 2: (1, 5), 4: (1, 3)}[ranks]
    argv = {
        "model_name_or_path": tiny_model,
        "meta_path": sample_data / "train.json",
        "output_dir": folder,
        "per_device_train_batch_size": records[0],
        "gradient_accumulation_steps": records[1],
        **THREE_STEPS,
    }
    words = flags(**{**argv, **values})
    if ranks == 1:
        assert train_here(words) == 0
    else:
        result = run_training(*words, ranks=ranks)
        assert result.returncode == 0, result.stderr[-3000:]
    return metrics(folder)


def assert_same_losses(one: list[dict], other: list[dict], keys=("loss", "grad_norm")) -> None:
    for key in ("records", "tokens", "supervised_tokens"):
        assert [row[key] for row in one] == [row[key] for row in other]
    for key in keys:
        assert [row[key] for row in other] == pytest.approx([row[key] for row in one], abs=TOLERANCE), key
    for first, second in zip(one, other, strict=True):
        assert second["sets"].keys() == first["sets"].keys()
        for name, part in first["sets"].items():
            assert second["sets"][name] == pytest.approx(part, abs=TOLERANCE), name


def assert_same_ledger(one, other) -> None:
    assert (one / "ledger.jsonl").read_text() == (other / "ledger.jsonl").read_text()


def assert_same_weights(one, two):
    """Compare saved weights on average, because Adam can amplify tiny differences."""
    name = next(n for n in ("adapter_model.safetensors", "model.safetensors") if (one / n).exists())
    first, second = (open_weights(folder / name) for folder in (one, two))
    assert first.keys() == second.keys()
    for key, read in first.items():
        a, b = read(), second[key]()
        assert a.dtype == b.dtype
        assert (a - b).abs().mean() < 2e-5, key


@pytest.fixture(scope="module")
def one_rank(tiny_model, sample_data, tmp_path_factory):
    """Return a function that trains a configuration once on one rank and returns its folder."""
    done = {}

    def run(metrics, **values):
        key = json.dumps({name: str(value) for name, value in values.items()}, sort_keys=True)
        if key not in done:
            folder = tmp_path_factory.mktemp("one") / "run"
            train(metrics, tiny_model, sample_data, folder, 1, **values)
            done[key] = folder
        return done[key]

    return run


ALWAYS = [("ddp", 2, {}), ("fsdp", 2, {}), ("zero2", 2, LORA)]
REST = [
    (layout, ranks, {"loss_reduction": reduction, **recipe})
    for layout in LAYOUTS
    for ranks in (2, 4)
    for recipe in ({}, LORA)
    for reduction in ("sample", "token", "square")
]
OTHER = [
    ("ddp", 2, {"max_packed_tokens": 700}),
    ("fsdp", 2, {"max_packed_tokens": 700}),
    ("ddp", 2, {"packing": False}),
    ("zero3", 2, {"packing": False}),
    ("ddp", 2, {"freeze_backbone": False, "grad_checkpoint": False}),
    ("fsdp", 2, {"freeze_backbone": False, "grad_checkpoint": True}),
]


@pytest.mark.parametrize(
    ("layout", "ranks", "values"),
    [*ALWAYS, *(pytest.param(*case, marks=pytest.mark.slow) for case in (*REST, *OTHER))],
)
def test_several_ranks_equal_one(tiny_model, sample_data, tmp_path, metrics, one_rank, layout, ranks, values):
    # With 4 ranks a step has 12 records.
    steps = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2} if ranks == 4 else {}
    one = one_rank(metrics, **values, **steps)
    several = train(
        metrics, tiny_model, sample_data, tmp_path / "several", ranks, **LAYOUTS[layout], **values
    )
    assert_same_losses(metrics(one), several)
    assert_same_ledger(one, tmp_path / "several")
    assert_same_weights(one, tmp_path / "several")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp", "fsdp", "zero2", "zero3"])
def test_resume_is_exact_on_two_ranks(tiny_model, sample_data, tmp_path, metrics, layout):
    values = {**LAYOUTS[layout], "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    values["async_save"] = False  # no checkpoint may be skipped
    common = (metrics, tiny_model, sample_data)
    full = train(*common, tmp_path / "one", 2, **values)
    checkpoint = tmp_path / "one/checkpoint-2"
    rest = train(*common, tmp_path / "two", 2, **values, resume_from_checkpoint=checkpoint)
    assert [row["loss"] for row in rest] == [row["loss"] for row in full][2:]
    first, second = (open_weights(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for key, read in first.items():
        assert (read() == second[key]()).all(), key


MOVES = [("ddp", 2), ("fsdp", 2), ("ddp", 1), ("fsdp", 4), ("ddp", 4), ("ddp", 2)]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [{}, LORA], ids=["full", "lora"])
def test_resume_with_other_layouts_and_world_sizes(tiny_model, sample_data, tmp_path, metrics, recipe):
    """Six steps on six layouts, each resumed from the previous one, match six steps on one rank."""

    def values(ranks: int, steps: int) -> dict:
        batch = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4 // ranks}
        saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "async_save": False}
        # The schedule must not depend on where the run is interrupted.
        steps = {"max_steps": steps, "lr_scheduler_type": "constant", "allow_resume_changes": True}
        return {**batch, **saving, **recipe, **steps}

    common = (metrics, tiny_model, sample_data)
    one = train(*common, tmp_path / "one", 1, **values(1, len(MOVES)))
    for step, (layout, ranks) in enumerate(MOVES, start=1):
        several = LAYOUTS[layout] if ranks > 1 else {}
        moved = train(*common, tmp_path / "moved", ranks, **values(ranks, step), **several)
        (tmp_path / "moved/train_results.json").unlink()
    assert [row["step"] for row in moved] == [row["step"] for row in one]
    assert_same_losses(one, moved)
    assert_same_ledger(tmp_path / "one", tmp_path / "moved")
