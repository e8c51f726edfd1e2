"""Predictions of `m3llm plan`: memory shared with training, speed, idle GPUs and recommendation."""

import dataclasses
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.plan_accuracy import plan_model
from internvl_chat.data.index.cache import Lengths
from internvl_chat.train.planning.advice import batch_note, checkpoint_note, plan_notes, shortage_note
from internvl_chat.train.planning.estimate import Planner, recommend, usable_ranks
from internvl_chat.train.planning.hardware import GB, Hardware, find_efficiency, gpu_hardware
from internvl_chat.train.planning.modes import MODES
from internvl_chat.train.planning.speed import sent_bytes
from internvl_chat.train.planning.workload import Workload, uniform_workload
from internvl_chat.train.preflight import memory
from internvl_chat.utils.gpus import GPUS

H200 = gpu_hardware(GPUS[0], network=50, disk=1, price=2.0)
COMPONENTS = ("weights", "gradients", "optimizer state", "optimizer scratch", "communication buffers")


@pytest.fixture(scope="module")
def full():
    return plan_model("small", "full", "bfloat16", "cuda")


@pytest.fixture(scope="module")
def workload():
    return uniform_workload(10_000, 900, 2, 256)


def with_hardware(**changes) -> Hardware:
    return dataclasses.replace(H200, **changes)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_memory_is_that_of_the_training_planner(monkeypatch, parallel):
    """`m3llm plan` and `plan_memory` of training give the same plan."""
    planned = plan_model("smoke", "full", "float32", "cpu")
    lengths = Lengths(*np.array([[90, 300, 200, 80], [30, 10, 150, 8], [1, 3, 0, 1]], np.int32))
    planner = Planner(planned, Workload(lengths, 4, "", True), with_hardware(device="cpu"))
    estimate = next(e for e in planner.compare(2, 1, 2) if e.mode.name == parallel)
    mode = estimate.mode
    config = planner._config(mode, 2, 1, 2)
    monkeypatch.setattr(memory, "available_memory", lambda *_: 10**12)
    monkeypatch.setattr(memory, "all_gather_object", lambda value: [value])
    data = SimpleNamespace(epoch_lengths=lambda: lengths)
    plan = memory.plan_memory(config, planned.model, planner._sampler(2, 2), data)
    assert plan.parallel == parallel
    assert (plan.components, plan.pack, plan.total) == (
        estimate.memory.components, estimate.memory.pack, estimate.memory.total,
    )  # fmt: skip


def test_each_mode_shards_its_components(full, workload):
    single = Planner(full, workload, H200).compare(1, 1, 8)[0].memory.components
    modes = {e.mode.name: e.memory.components for e in Planner(full, workload, H200).compare(8, 1, 8)}
    sharded = {
        name: {part for part in COMPONENTS[:3] if components[part] < 0.9 * single[part]}
        for name, components in modes.items()
    }
    assert sharded == {
        "ddp": set(),
        "fsdp": {"weights", "gradients", "optimizer state"},
        "zero1": {"optimizer state"},
        "zero2": {"gradients", "optimizer state"},
        "zero3": {"weights", "gradients", "optimizer state"},
    }


def test_hsdp_shards_within_a_node(full, workload):
    """With two nodes of two ranks, the memory is that of FSDP2 on one node."""
    planner = Planner(full, workload, H200)
    two = {e.mode.name: e for e in planner.compare(4, 2, 4)}
    (one,) = (e for e in planner.compare(2, 1, 2) if e.mode.name == "fsdp")
    assert list(two) == ["ddp", "hsdp", "fsdp", "zero1", "zero2", "zero3"]
    assert two["hsdp"].memory.components == one.memory.components
    assert two["hsdp"].checkpoint_bytes == two["fsdp"].checkpoint_bytes
    assert {e.mode.name for e in planner.compare(4, 1, 4) + planner.compare(4, 4, 4)} == two.keys() - {"hsdp"}


def test_only_gradient_shards_of_hsdp_cross_nodes(full, workload):
    """Two nodes of four ranks: an all-reduce of a quarter of the gradients sends half of its size twice."""
    hsdp = next(mode for mode in MODES if mode.name == "hsdp")
    sent = sent_bytes(hsdp, 8, 2, weights=1000.0, trained=800.0, packs=3.0)
    within = 3 / 4 * (2 * 3 * 1000 + 800)
    assert sent == {"sent": 0.0, "sent_within": within, "sent_between": 2 * 1 / 2 * 800 / 4}
    planner = Planner(full, workload, with_hardware(network=1e8))
    slow = {e.mode.name: e.step.communication for e in planner.compare(4, 2, 4)}
    assert slow["hsdp"] < slow["fsdp"]


def test_time_scales_with_the_hardware(full, workload):
    def step(**changes):
        return Planner(full, workload, with_hardware(**changes)).compare(2, 1, 2)[0].step

    base = step()
    assert step(flops=H200.flops / 10).compute == pytest.approx(10 * base.compute)
    assert step(bandwidth=H200.bandwidth / 10).optimizer == pytest.approx(10 * base.optimizer)
    slow = step(link=H200.link / 1e4)
    assert slow.limit == "communication" and slow.compute == base.compute
    assert base.overhead == slow.overhead > 0
    assert slow.total == pytest.approx(slow.compute + slow.optimizer + slow.communication + slow.overhead)


def test_network_limits_only_several_nodes(full, workload):
    planner = Planner(full, workload, with_hardware(network=1e6))
    one, two = (planner.compare(4, nodes, 4)[0].step.communication for nodes in (1, 2))
    assert two > 10 * one


def test_epoch_and_cost_follow_from_the_step(full, workload):
    estimate = Planner(full, workload, H200).compare(2, 1, 4)[0]
    assert estimate.steps == 2500
    assert estimate.epoch_hours == pytest.approx(2500 * estimate.step.total / 3600)
    assert estimate.cost == pytest.approx(estimate.epoch_hours * 2 * 2.0)
    row = estimate.to_dict()
    assert row["records_per_second"] == pytest.approx(4 / estimate.step.total)
    assert sum(row["components_gb"].values()) >= row["memory_gb"] > 0
    # bf16 weights, and float32 moments and masters.
    trained = full.parameters[1]
    assert estimate.checkpoint_bytes == full.size["all"] + 12 * trained


def test_lora_checkpoint_has_only_adapters():
    lora = plan_model("small", "lora", "bfloat16", "cuda")
    estimate = Planner(lora, uniform_workload(100, 900, 2, 256), H200).compare(1, 1, 16)[0]
    assert estimate.checkpoint_bytes == lora.parameters[1] * (4 + 8)


@pytest.mark.parametrize(
    ("batch", "gpus", "nodes", "used"),
    [(2, 8, 2, (2, 1)), (16, 8, 2, (8, 2)), (16, 6, 1, (4, 1)), (6, 4, 2, (3, 2)), (7, 4, 1, (1, 1))],
)
def test_ranks_divide_the_batch(batch, gpus, nodes, used):
    assert usable_ranks(batch, gpus, nodes) == used
    ranks = [
        g * n for g, n in itertools.product(range(1, gpus + 1), range(1, nodes + 1)) if batch % (g * n) == 0
    ]
    assert max(ranks) == used[0] * used[1]


def test_idle_gpus_are_reported(full, workload):
    planner = Planner(full, workload, H200)
    best = recommend(planner.compare(2, 1, 2))
    note = batch_note(planner, best, 8, 2)
    assert note.startswith("14 of 16 GPUs stay idle")
    assert "--batch_size 16" in note and "not the recipe" in note and "625 updates instead of 5,000" in note
    assert batch_note(planner, best, 2, 1) is None


def test_another_batch_is_reported(full, workload):
    planner = Planner(full, workload, H200)
    for batch, words in ((full.config.run.records_per_step, ""), (16, "not the recipe")):
        estimates = planner.compare(1, 1, batch)
        notes = plan_notes(planner, estimates, recommend(estimates), 1, 1)
        assert ("not the recipe" in " ".join(notes)) == bool(words)


def test_missing_memory_is_reported(full, workload):
    planner = Planner(full, workload, with_hardware(memory=0.8e9))
    note = shortage_note(planner.compare(1, 1, 2))
    assert "single needs" in note and "--weight_precision bf16" in note
    tiny = Planner(full, workload, with_hardware(memory=1e6))
    assert "more or larger GPUs" in shortage_note(tiny.compare(1, 1, 2))


def test_slow_disk_is_reported(full, workload):
    run = dataclasses.replace(full.config.run, save_strategy="steps", save_steps=10)
    fast, slow = (
        checkpoint_note(Planner(full, workload, with_hardware(disk=disk)).compare(1, 1, 2)[0], run)
        for disk in (1e12, 1e6)
    )
    assert "skipped" in slow and "skipped" not in fast


def test_recommendation_fits_and_prefers_simple_modes(full, workload):
    planner = Planner(full, workload, H200)
    estimates = planner.compare(2, 1, 2)
    assert recommend(estimates) in estimates[:2]
    smallest = min(estimates, key=lambda e: e.memory.total)
    tight = Planner(full, workload, with_hardware(memory=1.01 * smallest.memory.total / memory.USABLE))
    fits = {e.mode.name: e.fits for e in tight.compare(2, 1, 2)}
    assert fits[smallest.mode.name] and not fits["ddp"]
    assert fits[recommend(tight.compare(2, 1, 2)).mode.name]
    assert recommend(Planner(full, workload, with_hardware(memory=GB / 10)).compare(2, 1, 2)) is None


def test_thousands_of_ranks(full, workload):
    """Beyond `MAX_PAIRS`, the load is estimated; it must be consistent with the simulated values."""
    planner = Planner(full, workload, H200)
    hours = [recommend(planner.compare(n, max(1, n // 8), n)).epoch_hours * n for n in (64, 256, 4096)]
    assert hours == sorted(hours) and hours[-1] < 2 * hours[0]


def test_efficiency_of_unknown_gpus_is_assumed():
    assert not find_efficiency("cuda", "no such GPU").measured
    assert find_efficiency("cpu-float32").measured
    assert torch.device(H200.device).type == "cuda"
