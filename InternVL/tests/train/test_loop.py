"""The training loop: record weights, independence of packing, and the files of a run."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_within_rounding, flags, rounding_bound, terms_of

from internvl_chat.data.batching.collator import pack_samples
from internvl_chat.data.dataset import SampleIndex
from internvl_chat.data.encode.encoder import RecordEncoder
from internvl_chat.data.encode.tiling import normalize_tiles
from internvl_chat.model.flops import count_flops
from internvl_chat.model.io.weights import open_weights
from internvl_chat.train import checks
from internvl_chat.train import loop as loop_module
from internvl_chat.train.arguments import parse_arguments
from internvl_chat.train.checkpoint.saver import Checkpointer
from internvl_chat.train.checkpoint.state import TrainState
from internvl_chat.train.checks import check_configuration
from internvl_chat.train.distributed.strategy import Strategy
from internvl_chat.train.freeze import set_trainable
from internvl_chat.train.internvl_chat_finetune import main as train
from internvl_chat.train.loop import TrainingLoop
from internvl_chat.train.monitor import step_metrics
from internvl_chat.train.monitor.trackers import Trackers
from internvl_chat.train.setup import build_sampler, load_for_training, load_records
from internvl_chat.utils import distributed


class NoCheckpoints:
    """A checkpointer that does nothing."""

    busy = False

    def before_optimizer_step(self) -> None:
        pass


class KeepsGradients(torch.optim.SGD):
    """An optimizer that leaves gradients and weights unchanged after the backward pass."""

    def step(self) -> None:
        pass

    def zero_grad(self) -> None:
        pass


@pytest.fixture
def make_loop(tiny_model, sample_data, tmp_path):
    """Build a loop over the sample data, like the training script."""

    def make(**values) -> TrainingLoop:
        values = {"gradient_accumulation_steps": 6, "per_device_train_batch_size": 1, **values}
        config = parse_arguments(
            flags(
                model_name_or_path=tiny_model,
                meta_path=sample_data / "train.json",
                output_dir=tmp_path / "out",
                max_grad_norm=0,
                **values,
            )
        )
        plan = check_configuration(config)
        torch.manual_seed(0)
        model, tokenizer, preprocessing = load_for_training(plan)
        set_trainable(model, freeze_backbone=True)
        encoder = RecordEncoder(tokenizer, preprocessing.with_tile_limit(config.data.max_dynamic_patch))
        data, flops = load_records(config, plan.specs, encoder), count_flops(model)
        strategy = Strategy(
            model,
            lambda model: KeepsGradients(model.parameters(), lr=1.0),
            lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer),
            config.run.device,
        )
        sampler = build_sampler(config, data, flops)
        return TrainingLoop(
            config.run, strategy, data, sampler, "imagenet", flops, NoCheckpoints(), SimpleNamespace(),
            TrainState(),
        )  # fmt: skip

    return make


def gradients(loop, packs) -> tuple[float, dict[str, torch.Tensor]]:
    """Run a step on packs of samples; return its loss and gradients."""
    model = loop.strategy.model
    model.zero_grad()
    record = loop.train_step(1, [loop.packs[indices] for indices in packs])
    return record.loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_step(loop, loss, expected, other_loss, found) -> None:
    """Check that two steps have the same loss and gradients, up to the summation order."""
    terms = terms_of(loop.strategy.model)
    assert other_loss == pytest.approx(loss, abs=rounding_bound(terms, torch.float32, loss))
    assert found.keys() == expected.keys()
    # A backward pass has twice as many additions as a forward pass.
    for name, gradient in found.items():
        assert_within_rounding(gradient, expected[name], terms=3 * terms, name=name)


SAMPLES = [SampleIndex(index, 0) for index in (0, 5, 9, 13, 18, 21)]  # one of each category, text-only first
EXPONENTS = {"token": 0.0, "square": 0.5, "sample": 1.0}


@pytest.mark.parametrize("reduction", EXPONENTS)
def test_loss_is_the_weighted_mean_of_the_records(make_loop, reduction):
    loop = make_loop(loss_reduction=reduction)
    loss, found = gradients(loop, [SAMPLES])

    model, total, weights = loop.strategy.model, 0.0, 0.0
    model.zero_grad()
    for key in SAMPLES:
        sample, _ = loop.data[key]
        pack = pack_samples([(sample, True)])
        logits = model(pack.input_ids, normalize_tiles(pack.tiles, "imagenet")).logits[0]
        losses = torch.nn.functional.cross_entropy(logits[:-1], pack.labels[0, 1:], reduction="sum")
        n = int((pack.labels != -100).sum())
        total = total + losses * n ** -EXPONENTS[reduction]
        weights += n * n ** -EXPONENTS[reduction]
    expected = total / weights
    expected.backward()

    by_hand = {name: model.get_parameter(name).grad for name in found}
    assert_same_step(loop, expected.item(), by_hand, loss, found)


PACKINGS = {
    "unpacked": [[0], [1], [2], [3], [4], [5]],
    "pairs": [[0, 1], [2, 3], [4, 5]],
    "uneven": [[5, 2, 0], [4], [1, 3]],
    "one pack": [[0, 1, 2, 3, 4, 5]],
    "one pack, different order": [[3, 5, 1, 0, 4, 2]],
}


@pytest.mark.parametrize("reduction", EXPONENTS)
@pytest.mark.parametrize("checkpoint", [0, 1, 2])
def test_packing_does_not_change_gradients(make_loop, reduction, checkpoint):
    loop = make_loop(loss_reduction=reduction)
    loss, reference = gradients(loop, [[key] for key in SAMPLES])
    if checkpoint:
        loop.strategy.model.checkpoint_layers(checkpoint)
    for packing in PACKINGS.values():
        other_loss, other = gradients(loop, [[SAMPLES[i] for i in pack] for pack in packing])
        assert_same_step(loop, loss, reference, other_loss, other)


def test_vision_per_pack_does_not_change_gradients(make_loop):
    """The tower runs inside the model's forward pass, as with sharded weights."""
    loop = make_loop()
    loss, reference = gradients(loop, [SAMPLES[:3], SAMPLES[3:]])
    loop.strategy.model.always_run_vision = True
    other_loss, other = gradients(loop, [SAMPLES[:3], SAMPLES[3:]])
    assert_same_step(loop, loss, reference, other_loss, other)


def test_dummy_sample_does_not_change_gradients(make_loop):
    loop = make_loop()
    loss, expected = gradients(loop, [SAMPLES[:3]])
    dummy = SampleIndex(14, 0, counts=False)
    for packs in ([[*SAMPLES[:3], dummy]], [SAMPLES[:3], [dummy]]):
        padded_loss, found = gradients(loop, packs)
        assert_same_step(loop, loss, expected, padded_loss, found)


def test_text_only_step_gives_the_projector_zero_gradients(make_loop):
    _, found = gradients(make_loop(), [[SampleIndex(0, 0), SampleIndex(1, 0)]])
    projector = [gradient for name, gradient in found.items() if name.startswith("mlp1.")]
    assert len(projector) == 6
    assert all(not gradient.any() for gradient in projector)


def run(tiny_model, sample_data, folder, **values) -> int:
    argv = {
        "model_name_or_path": tiny_model,
        "meta_path": sample_data / "train.json",
        "output_dir": folder,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }
    return train(flags(**{**argv, **values}))


FULL = {}
LORA = {"use_llm_lora": 4, "freeze_llm": True, "freeze_mlp": True}
BOTH_LORA = {"use_llm_lora": 4, "use_backbone_lora": 2, "freeze_llm": True}


@pytest.mark.parametrize(
    ("recipe", "moves"),
    [
        (FULL, ("mlp1.", "language_model.")),
        (LORA, (".lora_",)),
        (BOTH_LORA, (".lora_", "mlp1.")),
        ({"freeze_llm": True, "unfreeze_lm_head": True, "freeze_mlp": True}, ("language_model.lm_head.",)),
        (
            {"freeze_llm": True, "freeze_mlp": True, "unfreeze_vit_layers": -1},
            ("vision_model.encoder.layers.1.",),
        ),
    ],
    ids=["full", "lora", "lora in both towers", "head", "last vision layer"],
)
def test_only_trainable_parameters_change(tiny_model, sample_data, tmp_path, recipe, moves, monkeypatch):
    before: dict[str, torch.Tensor] = {}
    loops: list[TrainingLoop] = []
    original = TrainingLoop.train

    def watched(self):
        before.update({n: p.detach().clone() for n, p in self.strategy.model.named_parameters()})
        loops.append(self)
        return original(self)

    monkeypatch.setattr(TrainingLoop, "train", watched)
    assert run(tiny_model, sample_data, tmp_path / "out", max_steps=6, save_strategy="no", **recipe) == 0
    moved = {n for n, p in loops[0].strategy.model.named_parameters() if not torch.equal(p, before[n])}
    expected = {n for n in before if any(part in n for part in moves)}
    # Embedding rows of tokens that do not occur stay the same, but the matrix changes.
    assert moved == expected


def test_files_of_a_run(tiny_model, sample_data, tmp_path, metrics):
    out = tmp_path / "out"
    assert run(tiny_model, sample_data, out, num_train_epochs=1, save_steps=4, save_total_limit=1) == 0
    rows = metrics(out)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["epoch"] == 1
    assert sum(row["records"] for row in rows) == 24
    keys = {"step", "epoch", "loss", "grad_norm", "learning_rate", "records", "tokens", "supervised_tokens",
            "tiles", "seconds", "pause_seconds", "records_per_second", "tokens_per_second", "max_memory_gb",
            "sets"}  # fmt: skip
    assert keys == rows[0].keys()
    for row in rows:
        sets = row["sets"].values()
        assert sum(part["records"] for part in sets) == row["records"]
        # With loss_reduction sample, all records have the same weight.
        total = sum(part["records"] * part["loss"] for part in sets)
        assert row["loss"] == pytest.approx(total / row["records"], rel=1e-5)
    ledger = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    used = [tuple(record) for row in ledger for record in row["trained"]]
    names = json.loads((sample_data / "train.json").read_text())
    assert sorted(used) == sorted((name, index) for name in names for index in range(4))
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-6"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessing.json", "config.yaml"} <= {
        p.name for p in out.iterdir()
    }
    assert not (out / ".partial").exists()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, "wait, step, step, step, step, save, wait"),
        ({"save_steps": 2}, "wait, step, step, save, wait, step, step, save, wait"),
        (
            {"eval_strategy": "steps", "eval_steps": 3, "eval_on_start": True},
            "validate, wait, step, step, step, validate, wait, step, validate, save, wait",
        ),
        (
            {"report_to": "wandb", "logging_steps": 2, "logging_first_step": True},
            "wait, step, wait, step, wait, step, step, save, wait",
        ),
    ],
    ids=["start", "save", "validation", "trackers"],
)
def test_ranks_wait_for_rank_0_outside_the_step(
    tiny_model, sample_data, tmp_path, monkeypatch, values, expected
):
    """Collectives in a step have the timeout --ddp_timeout; others may take longer."""
    events = []

    def record(owner, name, event):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kw: (events.append(event), original(*args, **kw))[1])

    record(distributed, "barrier", "wait")
    record(TrainingLoop, "train_step", "step")
    record(TrainingLoop, "validate", "validate")
    record(Checkpointer, "save", "save")
    monkeypatch.setattr(checks, "tracker_problems", lambda names: ())
    monkeypatch.setattr(Trackers, "start", lambda *_, **__: Trackers([]))
    if "eval_strategy" in values:
        values = values | {"eval_meta_path": sample_data / "held_out.json"}
    assert run(tiny_model, sample_data, tmp_path / "out", max_steps=4, **values) == 0
    assert ", ".join(events) == expected


def test_validation_and_saving_do_not_count_as_step_time(
    tiny_model, sample_data, tmp_path, monkeypatch, metrics
):
    """A step takes 2 s, a validation 30 s and a save 100 s."""
    clock = [0.0]

    def takes(owner, name, seconds):
        original = getattr(owner, name)

        def timed(*args, **kw):
            clock[0] += seconds
            return original(*args, **kw)

        monkeypatch.setattr(owner, name, timed)

    monkeypatch.setattr(loop_module.time, "perf_counter", lambda: clock[0])
    takes(TrainingLoop, "train_step", 2)
    takes(TrainingLoop, "validate", 30)
    takes(Checkpointer, "save", 100)
    values = {"eval_meta_path": sample_data / "held_out.json", "eval_strategy": "steps", "eval_steps": 3}
    out = tmp_path / "out"
    assert run(tiny_model, sample_data, out, max_steps=4, save_steps=2, eval_on_start=True, **values) == 0
    assert [row["seconds"] for row in metrics(out)] == [2, 2, 2, 2]
    assert [row["pause_seconds"] for row in metrics(out)] == [0, 0, 100, 30]
    assert [row["records_per_second"] for row in metrics(out)] == [2, 2, 2, 2]


def test_collectives_in_a_step_use_ddp_timeout(make_loop, monkeypatch):
    loop, calls = make_loop(), []

    def all_reduce(values, *, in_step=False):
        calls.append(in_step)
        return values

    monkeypatch.setattr(distributed, "all_reduce_sum", all_reduce)
    monkeypatch.setattr(step_metrics, "all_reduce_sum", all_reduce)
    gradients(loop, [SAMPLES])
    assert calls == [True, True]


def test_config_file_reproduces_the_run(tiny_model, sample_data, tmp_path, metrics):
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(tiny_model, sample_data, first, max_steps=3, save_strategy="no", seed=7) == 0
    config = (first / "config.yaml").read_text().replace(str(first), str(second))
    (tmp_path / "again.yaml").write_text(config)
    assert train([str(tmp_path / "again.yaml")]) == 0
    losses = [[row["loss"] for row in metrics(folder)] for folder in (first, second)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("recipe", [FULL, LORA], ids=["full", "lora"])
def test_bfloat16_recipe(tiny_model, sample_data, tmp_path, metrics, recipe):
    """Weights are bfloat16, adapters are float32, and the loss is close to the float32 loss."""
    losses = {}
    for bf16 in (True, False):
        out = tmp_path / f"out{bf16}"
        assert run(tiny_model, sample_data, out, bf16=bf16, max_steps=4, lora_dropout=0, **recipe) == 0
        losses[bf16] = [row["loss"] for row in metrics(out)]
        file = out / ("adapter_model.safetensors" if recipe else "model.safetensors")
        dtypes = {read().dtype for read in open_weights(file).values()}
        assert dtypes == {torch.bfloat16 if bf16 and not recipe else torch.float32}
    assert losses[True] == pytest.approx(losses[False], rel=0.01)
    assert json.loads((tmp_path / "outTrue/config.json").read_text())["torch_dtype"] == (
        "float32" if recipe else "bfloat16"
    )


def test_checkpoint_stores_the_tile_limit(tiny_model, sample_data, tmp_path):
    meta = json.loads((sample_data / "train.json").read_text())
    for entry in meta.values():
        entry["max_dynamic_patch"] = 1
    path = tmp_path / "meta.json"
    path.write_text(json.dumps(meta))
    out = tmp_path / "out"
    assert run(tiny_model, sample_data, out, meta_path=path, max_steps=1, max_dynamic_patch=6) == 0
    assert json.loads((out / "preprocessing.json").read_text())["max_dynamic_patch"] == 1
    assert json.loads((out / "config.json").read_text())["max_dynamic_patch"] == 1
