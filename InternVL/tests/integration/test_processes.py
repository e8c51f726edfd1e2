"""A multi-rank run matches a single-rank run with the same global batch, for every parallel layout.

    pytest InternVL/tests/integration/test_processes.py -m ""

runs all layouts on 2 and 4 ranks, for both recipes, with and without packing; without `-m ""`, only a few.
"""

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
    "hsdp": {"parallel": "hsdp"},  # on two nodes
    **{f"zero{stage}": {"deepspeed": DEEPSPEED / f"zero{stage}.json"} for stage in (1, 2, 3)},
}
# Losses differ only in the summation order.
TOLERANCE = 1e-5


def train(metrics, tiny_model, sample_data, folder, ranks, **values) -> list[dict]:
    """Train and return the rows of `metrics.jsonl`; steps have 10 of the 24 records, the last step has 4."""
    records = {1: (5, 2), 2: (1, 5), 3: (1, 4), 4: (1, 3)}[ranks]
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
        result = run_training(*words, ranks=ranks, nodes=2 if values.get("parallel") == "hsdp" else 1)
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


ALWAYS = [("ddp", 2, {}), ("fsdp", 2, {}), ("zero2", 2, LORA), ("hsdp", 4, {})]
MATRIX = [
    (layout, ranks, {"packing": packing, **recipe})
    for layout in LAYOUTS
    for ranks in ((4,) if layout == "hsdp" else (2, 4))
    for recipe in ({}, LORA)
    for packing in (True, False)
]
REDUCTIONS = [
    (layout, 4 if layout == "hsdp" else 2, {"loss_reduction": reduction, **recipe})
    for layout in LAYOUTS
    for recipe in ({}, LORA)
    for reduction in ("token", "square")
]
OTHER = [
    ("ddp", 2, {"max_packed_tokens": 700}),
    ("fsdp", 2, {"max_packed_tokens": 700}),
    ("hsdp", 4, {"max_packed_tokens": 700}),
    # 10 records on 3 ranks.
    ("ddp", 3, {"gradient_accumulation_steps": None, "global_batch_size": 10, "packing": False}),
    ("ddp", 2, {"freeze_backbone": False, "grad_checkpoint": False}),
    ("fsdp", 2, {"freeze_backbone": False, "grad_checkpoint": True}),
    ("fsdp", 2, {"cpu_offload": True, "max_packed_tokens": 700}),
    ("hsdp", 4, {"cpu_offload": True}),
    *(("zero2", 2, {"deepspeed": DEEPSPEED / "zero2_offload.json", **recipe}) for recipe in ({}, LORA)),
    *(("zero3", 2, {"deepspeed": DEEPSPEED / "zero3_offload.json", **recipe}) for recipe in ({}, LORA)),
]
LAYOUT_FLAGS = {"parallel", "deepspeed", "cpu_offload"}


@pytest.mark.parametrize(
    ("layout", "ranks", "values"),
    [*ALWAYS, *(pytest.param(*case, marks=pytest.mark.slow) for case in (*MATRIX, *REDUCTIONS, *OTHER))],
)
def test_several_ranks_equal_one(tiny_model, sample_data, tmp_path, metrics, one_rank, layout, ranks, values):
    # With 4 ranks a step has 12 records.
    steps = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2} if ranks == 4 else {}
    one = one_rank(metrics, **{k: v for k, v in values.items() if k not in LAYOUT_FLAGS}, **steps)
    values = {**LAYOUTS[layout], **values}
    several = train(metrics, tiny_model, sample_data, tmp_path / "several", ranks, **values)
    assert_same_losses(metrics(one), several)
    assert_same_ledger(one, tmp_path / "several")
    assert_same_weights(one, tmp_path / "several")


def test_offload_on_a_single_rank(tiny_model, sample_data, tmp_path, metrics, one_rank):
    """For models that are larger than the GPU; on a CPU, only the results can be compared."""
    values = {"parallel": "fsdp", "cpu_offload": True}
    offloaded = train(metrics, tiny_model, sample_data, tmp_path / "run", 1, **values)
    one = one_rank(metrics)
    assert_same_losses(metrics(one), offloaded)
    assert_same_weights(one, tmp_path / "run")


def test_hsdp_needs_several_ranks_per_node(tiny_model, sample_data, tmp_path):
    argv = {"model_name_or_path": tiny_model, "meta_path": sample_data / "train.json"}
    argv |= {"output_dir": tmp_path / "run", "parallel": "hsdp"}
    result = run_training(*flags(**argv), ranks=2, nodes=2)
    assert result.returncode == 2
    assert "--parallel hsdp: with one rank per node, there is nothing to shard" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        *(LAYOUTS[name] for name in ("ddp", "fsdp", "zero2", "zero3")),
        {"parallel": "fsdp", "cpu_offload": True},
        *({"deepspeed": DEEPSPEED / f"zero{stage}_offload.json"} for stage in (2, 3)),
    ],
    ids=["ddp", "fsdp", "zero2", "zero3", "fsdp-offload", "zero2-offload", "zero3-offload"],
)
def test_resume_is_exact_on_two_ranks(tiny_model, sample_data, tmp_path, metrics, layout):
    values = {**layout, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    values["async_save"] = False  # no checkpoint may be skipped
    common = (metrics, tiny_model, sample_data)
    full = train(*common, tmp_path / "one", 2, **values)
    checkpoint = tmp_path / "one/checkpoint-2"
    rest = train(*common, tmp_path / "two", 2, **values, resume_from_checkpoint=checkpoint)
    assert [row["loss"] for row in rest] == [row["loss"] for row in full][2:]
    first, second = (open_weights(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for key, read in first.items():
        assert (read() == second[key]()).all(), key


MOVES = [
    ("ddp", 2, {}), ("fsdp", 3, {}), ("ddp", 1, {}), ("hsdp", 4, {}), ("fsdp", 2, {"cpu_offload": True}),
    ("ddp", 4, {}), ("hsdp", 4, {"cpu_offload": True}), ("ddp", 1, {}),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [{}, LORA], ids=["full", "lora"])
def test_resume_with_other_layouts_and_world_sizes(tiny_model, sample_data, tmp_path, metrics, recipe):
    """Steps on several layouts, each resumed from the previous one, match the same steps on one rank."""

    def values(steps: int) -> dict:
        # The global batch need not be divisible by the number of ranks.
        batch = {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": None,
            "global_batch_size": 4,
        }
        saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "async_save": False}
        # The schedule must not depend on where the run is interrupted.
        steps = {"max_steps": steps, "lr_scheduler_type": "constant", "allow_resume_changes": True}
        return {**batch, **saving, **recipe, **steps}

    common = (metrics, tiny_model, sample_data)
    one = train(*common, tmp_path / "one", 1, **values(len(MOVES)))
    for step, (layout, ranks, changed) in enumerate(MOVES, start=1):
        several = LAYOUTS[layout] if ranks > 1 else {}
        moved = train(*common, tmp_path / "moved", ranks, **values(step), **several, **changed)
        (tmp_path / "moved/train_results.json").unlink()
    assert [row["step"] for row in moved] == [row["step"] for row in one]
    assert_same_losses(one, moved)
    assert_same_ledger(tmp_path / "one", tmp_path / "moved")
