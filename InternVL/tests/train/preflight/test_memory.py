"""The memory plan: components computed by hand for every parallel layout, and the resulting choices."""

import itertools
import json
import logging
import re
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from helpers import needs_bitsandbytes

from benchmarks.plan_accuracy import plan_model
from benchmarks.shapes import SHAPES, weightless_model
from internvl_chat.data.batching.packing import StepPlanner
from internvl_chat.data.batching.sampler import StepSampler
from internvl_chat.data.index.cache import Lengths
from internvl_chat.model.io.checkpoint import load_model
from internvl_chat.model.lora.injection import add_lora
from internvl_chat.model.lora.quantization import quantize_decoder
from internvl_chat.model.memory import Activations, PackSize
from internvl_chat.train.freeze import set_trainable
from internvl_chat.train.preflight import memory
from internvl_chat.train.preflight.memory import (
    MemoryPlan,
    available_memory,
    layout_host_memory,
    layout_memory,
    plan_memory,
)
from internvl_chat.utils import hardware
from internvl_chat.utils.errors import UsageError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NAMES = ("weights", "gradients", "optimizer state", "optimizer scratch", "communication buffers")

# ---- weights, gradients, optimizer and communication


def run_of(ranks: int = 1, zero: dict | None = None, device: torch.device = CPU, **values) -> SimpleNamespace:
    deepspeed = None if zero is None else {"zero_optimization": zero}
    values = {"local_world_size": ranks, "cpu_offload": False, "optim": "adamw_torch"} | values
    return SimpleNamespace(device=device, world_size=ranks, deepspeed=deepspeed, **values)


def components(
    model, parallel: str, ranks: int, precision: str = "master", zero=None, *, several=False, compiled=True
) -> dict[str, int]:
    run = run_of(ranks, zero, CUDA if zero else CPU)
    return layout_memory(model, run, parallel, precision, several, compiled)


@pytest.fixture(scope="module")
def full_8b():
    """InternVL3-8B for full training (language model and projector), without weights."""
    model = weightless_model(SHAPES["internvl3-8b"])
    set_trainable(model, freeze_llm=False, freeze_mlp=False, freeze_backbone=True)
    return model


# Parameter counts of InternVL3-8B, computed by hand.
VOCABULARY, WIDTH, INNER = 151_674, 3584, 18_944
EMBEDDING = VOCABULARY * WIDTH
ATTENTION = WIDTH * (WIDTH + 2 * 512) + WIDTH + 2 * 512 + WIDTH * WIDTH  # q, k, v with biases; o
LAYER = ATTENTION + 3 * WIDTH * INNER + 2 * WIDTH
PROJECTOR = 2 * 4096 + 4096 * WIDTH + WIDTH + WIDTH * WIDTH + WIDTH
TRAINED = 28 * LAYER + 2 * EMBEDDING + WIDTH + PROJECTOR
BLOCK = 4 * 1024 * 1024 + 2 * 1024 * 4096 + 4 * 1024 + 1024 + 4096 + 6 * 1024  # biases, norms, layer scales
VISION_ROOT = 3 * 14 * 14 * 1024 + 1024 + 1024 + 1025 * 1024  # patches, class token, positions
ALL = TRAINED + 24 * BLOCK + VISION_ROOT


def test_full_training_of_8b_on_one_gpu(full_8b):
    """15.9 GB weights, 15.3 gradients, and 91.7 of state: 61.1 moments, 30.6 masters."""
    found = components(full_8b, "single", 1)
    assert found == dict(zip(NAMES, (2 * ALL, 2 * TRAINED, 12 * TRAINED, 0, 0), strict=True))
    assert [round(size / 1e9, 1) for size in found.values()] == [15.9, 15.3, 91.7, 0, 0]
    assert round(8 * TRAINED / 1e9, 1) == 61.1 and round(4 * TRAINED / 1e9, 1) == 30.6
    states = {p: components(full_8b, "single", 1, p)["optimizer state"] for p in ("stochastic", "bf16")}
    assert states == {"stochastic": 8 * TRAINED, "bf16": 4 * TRAINED}


@pytest.mark.parametrize("ranks", [2, 8])
def test_ddp_stores_gradients_once(full_8b, ranks):
    """They are in the buckets; only the largest one, the embedding's, exists twice while it is copied."""
    single, ddp = components(full_8b, "single", 1), components(full_8b, "ddp", ranks)
    assert ddp == single | {"communication buffers": 2 * EMBEDDING}


def test_ddp_accumulates_gradients_outside_the_buckets(full_8b):
    """For all packs except the last; see `test_unreduced_gradients_are_not_bucket_views`."""
    found = components(full_8b, "ddp", 2, several=True)
    assert found["gradients"] == found["communication buffers"] == 2 * TRAINED


@pytest.mark.parametrize(
    ("ranks", "gigabytes"), [(2, [10.2, 10.3, 45.8, 0, 1.4]), (8, [4.2, 4.6, 11.5, 0, 1.4])]
)
def test_fsdp_of_8b(full_8b, ranks, gigabytes):
    """Shards of everything, the unsharded root with its gradients, and one layer's gradients and buffers."""
    found = components(full_8b, "fsdp", ranks)
    root = 2 * (2 * EMBEDDING + WIDTH + PROJECTOR)
    assert found == {
        "weights": 2 * ALL // ranks + root + 2 * VISION_ROOT,
        "gradients": 2 * TRAINED // ranks + root + 2 * LAYER,
        "optimizer state": 12 * TRAINED // ranks,
        "optimizer scratch": 0,
        "communication buffers": 3 * 2 * LAYER,
    }
    assert [round(size / 1e9, 1) for size in found.values()] == gigabytes
    several = components(full_8b, "fsdp", ranks, several=True)
    assert several == found | {"gradients": 2 * TRAINED + 2 * LAYER}


def test_hsdp_of_8b_shards_within_a_node(full_8b):
    run = run_of(16, local_world_size=8)
    assert layout_memory(full_8b, run, "hsdp", "master", False, True) == components(full_8b, "fsdp", 8)


@pytest.mark.parametrize("ranks", [1, 8])
def test_cpu_offload_of_8b(full_8b, ranks):
    """The GPU has the unsharded root with its gradients, one layer's gradients and three layers' weights."""
    run, root = run_of(ranks), 2 * (2 * EMBEDDING + WIDTH + PROJECTOR)
    for several in (False, True):
        found = layout_memory(full_8b, run, "fsdp", "master", several, True, True)
        sizes = (root + 2 * VISION_ROOT, root + 2 * LAYER, 0, 0, 3 * 2 * LAYER)
        assert found == dict(zip(NAMES, sizes, strict=True))
    assert round(sum(found.values()) / 1e9, 1) == 6.3
    host = layout_host_memory(full_8b, run, "fsdp", "master", True)
    assert host == (2 * ALL + 2 * TRAINED + 12 * TRAINED) // ranks
    assert layout_host_memory(full_8b, run, "fsdp", "master", False) == 0


@pytest.mark.parametrize("ranks", [2, 8])
def test_zero_1_shards_only_the_optimizer(full_8b, ranks):
    """Gradients are unsharded; masters and moments are float32 for every `--weight_precision`."""
    bucket = 10**8
    for precision in ("master", "bf16"):
        found = components(full_8b, "deepspeed", ranks, precision, {"stage": 1, "reduce_bucket_size": bucket})
        sizes = (2 * ALL, 2 * TRAINED, 12 * TRAINED // ranks, 4 * TRAINED // ranks, 2 * bucket)
        assert found == dict(zip(NAMES, sizes, strict=True))


def test_zero_2_and_3(full_8b):
    zero = {"stage": 2, "reduce_bucket_size": "1e8", "overlap_comm": True}
    found = components(full_8b, "deepspeed", 2, zero=zero)
    # The embedding's gradient does not fit in a bucket, so it is unsharded until it is reduced.
    gradients = TRAINED + 2 * EMBEDDING
    sizes = (2 * ALL, gradients, 6 * TRAINED, 2 * TRAINED, 2 * 2 * 10**8)
    assert found == dict(zip(NAMES, sizes, strict=True))
    zero = {"stage": 3, "reduce_bucket_size": "auto", "overlap_comm": False}
    zero |= {"stage3_max_live_parameters": 3e8, "stage3_prefetch_bucket_size": "auto"}
    found = components(full_8b, "deepspeed", 2, zero=zero)
    sizes = (ALL, gradients, 6 * TRAINED, 2 * TRAINED, 2 * (WIDTH**2 + 3 * 10**8 + WIDTH**2))
    assert found == dict(zip(NAMES, sizes, strict=True))


def test_zero_allocates_whole_buckets():
    """On a GPU, two buckets of the configured size; on a CPU, only what the gradients of a step fill.

    There, they replace the activations, like the scratch memory of the optimizer. So do the gradients, which
    are float32, unless they are accumulated.
    """
    model = plan_model("smoke", "lora", "bfloat16", "cuda").model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    zero = {"stage": 1, "reduce_bucket_size": 10**9, "overlap_comm": True}
    for device, several, gradients, scratch, buffers in (
        (CUDA, False, 4 * trained, 2 * trained, 4 * 10**9),
        (CPU, True, 4 * trained, (2 + 2) * trained, 0),
        (CPU, False, 0, (2 + 2 + 4) * trained, 0),
    ):
        found = layout_memory(model, run_of(2, zero, device), "deepspeed", "master", several, True)
        names = ("gradients", "optimizer scratch", "communication buffers")
        assert [found[name] for name in names] == [gradients, scratch, buffers]


def test_zero_with_offloading(full_8b):
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "none"}}
    found = components(full_8b, "deepspeed", 2, zero=zero)
    assert (found["weights"], found["optimizer state"], found["optimizer scratch"]) == (ALL, 0, 0)
    zero["offload_param"] = {"device": "nvme"}
    assert components(full_8b, "deepspeed", 2, zero=zero)["weights"] == 0
    assert layout_host_memory(full_8b, run_of(2, zero), "deepspeed", "master", False) == 8 * TRAINED
    zero["offload_param"] = {"device": "cpu"}
    host = layout_host_memory(full_8b, run_of(2, zero), "deepspeed", "master", False)
    assert host == 8 * TRAINED + ALL


@needs_bitsandbytes
def test_qlora_of_8b():
    """Per decoder weight: half a byte, a byte per 64, and 4 bytes per 16,384; and one layer in bf16."""
    model = weightless_model(SHAPES["internvl3-8b"])
    quantize_decoder(model)
    add_lora(model, llm_rank=16)
    set_trainable(model, freeze_llm=True, freeze_mlp=True, freeze_backbone=True)
    matrices = (2 * WIDTH * 512, 2 * WIDTH * WIDTH, 3 * WIDTH * INNER)  # k and v, q and o, MLP
    sizes = [WIDTH * 512] * 2 + [WIDTH * WIDTH] * 2 + [WIDTH * INNER] * 3
    assert sum(sizes) == sum(matrices)
    quantized = 28 * sum(size // 2 + size // 64 + 4 * -(-size // 64 // 256) for size in sizes)
    adapters = 28 * 16 * (2 * (WIDTH + 512) + 2 * 2 * WIDTH + 3 * (WIDTH + INNER))
    found = components(model, "single", 1)
    assert found["weights"] == quantized + 2 * WIDTH * INNER + 2 * (ALL - 28 * sum(sizes)) + 4 * adapters
    assert (found["gradients"], found["optimizer state"]) == (4 * adapters, 8 * adapters)
    assert round(sum(found.values()) / 1e9, 1) == 7.0


def test_weight_norms_of_dora(tiny_model):
    """peft computes them in float32: an identity matrix, and four matrices of the size of the weights."""
    model = load(tiny_model)
    plain = components(model, "single", 1)["weights"]
    add_lora(model, llm_rank=2, use_dora=True)
    adapters = sum(p.nbytes for name, p in model.named_parameters() if ".lora_" in name)
    inner = model.language_model.config.intermediate_size
    assert components(model, "single", 1)["weights"] - plain - adapters == 4 * inner * (inner + 4 * 48)


def load(folder, dtype: torch.dtype = torch.bfloat16):
    model = load_model(folder, image_context_id=0, dtype=dtype, attn="varlen")
    set_trainable(model, freeze_llm=False, freeze_mlp=False, freeze_backbone=True)
    return model.train()


def test_float32_weights_need_no_masters(tiny_model):
    model = load(tiny_model, torch.float32)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for precision in ("master", "stochastic", "bf16"):
        found = components(model, "single", 1, precision, compiled=False)
        assert (found["optimizer state"], found["optimizer scratch"]) == (8 * trained, 0)


def test_an_eager_optimizer_step_needs_scratch(tiny_model):
    """A float32 copy of the largest matrix's gradient and, for stochastic rounding, two more of its size."""
    model = load(tiny_model)
    largest = max(p.numel() for p in model.parameters())
    scratch = {p: components(model, "single", 1, p, compiled=False) for p in ("master", "stochastic")}
    assert scratch["master"]["optimizer scratch"] == 4 * largest
    assert scratch["stochastic"]["optimizer scratch"] == 12 * largest
    assert components(model, "single", 1, compiled=True)["optimizer scratch"] == 0


# ---- the peak


def a_plan(**values) -> MemoryPlan:
    sizes = (100, 50, 200, values.pop("scratch", 0), 10)
    parts = dict(zip(NAMES, sizes, strict=True)) | {"activations": 60, "logits": 7, "vision": 3}
    plan = {
        "parallel": "single", "checkpointed_layers": 1, "components": parts, "available": 1000,
        "pack": PackSize(1234, 56, 7), "sample_indices": [], "several_packs": False, "layers": 4,
        "fitting_flags": lambda limit: {},
    }  # fmt: skip
    return MemoryPlan(**(plan | values))


@pytest.mark.parametrize(("scratch", "total"), [(0, 430), (80, 430), (81, 431), (1000, 1350)])
def test_scratch_and_activations_do_not_overlap(scratch, total):
    assert a_plan(scratch=scratch).total == total


def test_table_lists_every_component():
    table = a_plan(available=8e10).table()
    assert "memory plan in GB per rank (single, 1 of 4 decoder layers checkpointed): 4.3e-07 of 80\n" in table
    assert "largest pack: 1234 tokens (56 supervised), 7 tiles" in table
    assert all(f"{name} " in table for name in (*NAMES, "activations", "logits", "vision"))


# ---- choices

# Weights, gradients, state and activations of the small runs below are of this order.
ACTIVATIONS = Activations(
    layers=4,
    layer_token=10_000.0,
    layer_square=0.0,
    input_token=100.0,
    supervised=2000.0,
    tile=3000.0,
    checkpointed_tile=3000.0,
)
TOKENS = np.array([100, 80, 60, 40, 90, 70, 50, 30])
LENGTHS = Lengths(TOKENS, TOKENS // 10, TOKENS // 50)


class Run:
    """A run of 8 records on devices with the given memory."""

    def __init__(self, model, monkeypatch, *, ranks: int = 1, nodes: int = 1) -> None:
        self.model, self.monkeypatch, self.ranks, self.nodes = model, monkeypatch, ranks, nodes
        monkeypatch.setattr(memory, "measure_activations", lambda *_, **__: ACTIVATIONS)
        monkeypatch.setattr(memory, "all_gather_object", lambda value: [value] * ranks)
        known = {}

        def once(model, run, *key):
            known_key = (*key, json.dumps(run.deepspeed))
            if known_key not in known:
                known[known_key] = layout_memory(model, run, *key)
            return known[known_key]

        monkeypatch.setattr(memory, "layout_memory", once)

    def plan(self, available: float = 1e12, host: float | None = None, **flags) -> MemoryPlan:
        on_host = available if host is None else host
        memories = {"cpu": on_host, "cuda": available} if flags.get("device") else {"cpu": available}
        self.monkeypatch.setattr(memory, "available_memory", lambda device, ranks: memories[device.type])
        values = {
            "parallel": "auto", "weight_precision": "master", "optim": "adamw_torch",
            "grad_checkpoint": "auto", "max_packed_tokens": 400, "count_steps": lambda steps: steps, **flags,
        }  # fmt: skip
        packed, checkpoint = values.pop("max_packed_tokens"), values.pop("grad_checkpoint")
        run = run_of(self.ranks, local_world_size=self.ranks // self.nodes, **values)
        config = SimpleNamespace(run=run, model=SimpleNamespace(grad_checkpoint=checkpoint))
        planner = StepPlanner(self.ranks, TOKENS, TOKENS, packed)
        sampler = StepSampler([8], step_records=8, planner=planner, strategy="sequential")
        return plan_memory(config, self.model, sampler, SimpleNamespace(epoch_lengths=lambda: LENGTHS))

    def error(self, available: float, **flags) -> str:
        with pytest.raises(UsageError) as caught:
            self.plan(available, **flags)
        return str(caught.value)

    def flags_named(self, available: float, **flags) -> list[str]:
        text = self.error(available, **flags).partition("flags that would fit: ")[2]
        return re.findall(r"(--\w+ \w+) \(", text)


@pytest.fixture
def model(tiny_model):
    return load(tiny_model)


def test_fewest_layers_are_checkpointed(model, monkeypatch):
    run = Run(model, monkeypatch)
    largest = run.plan(grad_checkpoint="False")
    layer, kept = largest.pack.tokens * 10_000, largest.pack.tokens * 100
    # A single checkpointed layer saves nothing, because it is recomputed while the others are in memory.
    totals = {n: largest.total - max(0, n - 1) * layer + n * kept for n in range(5)}
    assert run.plan(grad_checkpoint="True").total == totals[4]
    for available in np.linspace(totals[4], totals[1], 50):
        plan = run.plan(available)
        assert plan.total == totals[plan.checkpointed_layers] <= available
        assert all(totals[n] > available for n in range(plan.checkpointed_layers))
        assert plan.parallel == "single"


def test_flags_rejected_by_deepspeed_are_not_suggested(model, monkeypatch):
    run = Run(model, monkeypatch, ranks=2)
    flags = {"parallel": "deepspeed", "zero": {"stage": 2}}
    needed = run.plan(grad_checkpoint="True", **flags).total
    named = run.flags_named(needed, grad_checkpoint="False", **flags)
    assert "--grad_checkpoint True" in named
    assert not any(flag.startswith(("--parallel", "--weight_precision")) for flag in named)


@pytest.mark.parametrize(("flag", "layers"), [("True", 4), ("False", 0)])
def test_requested_checkpointing_is_applied(model, monkeypatch, flag, layers):
    assert Run(model, monkeypatch).plan(grad_checkpoint=flag).checkpointed_layers == layers


@pytest.mark.parametrize("precision", ["master", "stochastic", "bf16"])
def test_memory_never_changes_the_weight_precision(model, monkeypatch, precision):
    """The planned state follows the flag, with ample and with scarce memory."""
    run = Run(model, monkeypatch)
    much = run.plan(weight_precision=precision)
    least = run.plan(grad_checkpoint="True", weight_precision=precision).total
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    state = trained * {"master": 12, "stochastic": 8, "bf16": 4}[precision]
    for plan in (much, run.plan(least, weight_precision=precision)):
        assert plan.components["optimizer state"] == state
    text = run.error(least - 1, weight_precision=precision)
    assert f"optimizer state {state / 1e9:.4g}," in text


def test_state_of_other_optimizers_has_the_dtype_of_the_weights(model, monkeypatch):
    run = Run(model, monkeypatch)
    assert run.plan(optim="adafactor").components == run.plan(weight_precision="bf16").components


def test_auto_chooses_ddp_if_it_fits_otherwise_fsdp(model, monkeypatch, caplog):
    run = Run(model, monkeypatch, ranks=2)
    with caplog.at_level(logging.INFO):
        plan = run.plan()
        assert (plan.parallel, plan.checkpointed_layers) == ("ddp", 0)
        assert f"--parallel auto: ddp, because ddp needs {plan.total / 1e9:.4g} of 1000 GB" in caplog.text
        least = run.plan(parallel="ddp", grad_checkpoint="True").total
        assert run.plan(least).parallel == "ddp"  # checkpointing is preferred to sharding
        caplog.clear()
        # Activations dominate the memory of a small model, so FSDP saves little.
        fsdp = run.plan(parallel="fsdp", grad_checkpoint="True").total
        assert fsdp < least
        assert run.plan(least - 1).parallel == "fsdp"
    assert f"--parallel auto: fsdp, because ddp needs {least / 1e9:.4g} of" in caplog.text
    assert "per rank (fsdp, 4 of 4 decoder layers checkpointed)" in caplog.text
    assert "per rank (fsdp" in run.error(fsdp - 1)


def test_auto_chooses_hsdp_on_several_nodes_if_it_fits(model, monkeypatch):
    run = Run(model, monkeypatch, ranks=8, nodes=4)
    ddp, hsdp, fsdp = (
        run.plan(parallel=parallel, grad_checkpoint="True").total for parallel in ("ddp", "hsdp", "fsdp")
    )
    assert ddp > hsdp > fsdp
    plans = [run.plan(available).parallel for available in (ddp, hsdp, hsdp - 1)]
    assert plans == ["ddp", "hsdp", "fsdp"]
    # With a single rank per node, there is nothing to shard within a node.
    assert Run(model, monkeypatch, ranks=8, nodes=8).plan(ddp - 1).parallel == "fsdp"


def test_cpu_offload_is_planned_for_gpus(model, monkeypatch):
    monkeypatch.setattr(memory, "uses_compiled_step", lambda precision, device: True)
    run = Run(model, monkeypatch)
    values = {"device": CUDA, "grad_checkpoint": "True"}
    offloaded = run.plan(parallel="fsdp", cpu_offload=True, **values)
    assert offloaded.components["optimizer state"] == 0
    needed, host = offloaded.total / 0.95 + 1, offloaded.host
    assert f"; host memory: {host / 1e9:.4g} of 1000\n" in offloaded.table()
    assert "--cpu_offload True" in run.flags_named(needed, host=host, **values)
    assert "--cpu_offload True" not in run.flags_named(needed, host=host - 1, **values)
    text = run.error(1e12, host=host - 1, parallel="fsdp", cpu_offload=True, **values)
    assert "the offloaded state needs" in text and "GB of host memory per rank" in text
    # On a CPU, nothing moves.
    plan = run.plan(parallel="fsdp", cpu_offload=True)
    assert plan.host == 0 and plan.components["optimizer state"] > 0


@pytest.mark.parametrize(
    ("ranks", "asked", "taken"),
    [
        (1, "auto", "single"),
        (1, "ddp", "single"),
        (2, "ddp", "ddp"),
        (1, "fsdp", "fsdp"),
        (2, "fsdp", "fsdp"),
    ],
)
def test_requested_parallel_layout_is_used(model, monkeypatch, ranks, asked, taken):
    assert Run(model, monkeypatch, ranks=ranks).plan(parallel=asked).parallel == taken


def test_deepspeed_is_planned_from_its_configuration(model, monkeypatch):
    monkeypatch.setattr(memory, "uses_compiled_step", lambda precision, device: True)
    run = Run(model, monkeypatch, ranks=2)
    plans = [run.plan(parallel="deepspeed", zero={"stage": stage}, device=CUDA) for stage in (1, 2, 3)]
    assert all(plan.parallel == "deepspeed" for plan in plans)
    gradients = [plan.components["gradients"] for plan in plans]
    assert gradients[0] == 2 * gradients[1] == 2 * gradients[2]
    weights = [plan.components["weights"] for plan in plans]
    assert weights[0] == weights[1] == 2 * weights[2]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("checkpoint", ["auto", "False"])
@pytest.mark.parametrize("precision", ["master", "stochastic", "bf16"])
def test_exactly_the_fitting_flags_are_suggested(model, monkeypatch, ranks, checkpoint, precision):
    """Each flag is verified with a new plan, for capacities down to a tenth of the required memory."""
    run = Run(model, monkeypatch, ranks=ranks)
    asked = {"parallel": "ddp", "grad_checkpoint": checkpoint, "weight_precision": precision}
    least = run.plan(**asked | {"grad_checkpoint": {"auto": "True"}.get(checkpoint, checkpoint)}).total
    named = set()
    for fraction in (0.1, 0.5, 0.7, 0.8, 0.9, 0.95, 0.999):
        available = fraction * least
        flags = run.flags_named(available, **asked)
        named.update(flags)
        tried = [f"--weight_precision {p}" for p in ("master", "stochastic", "bf16")]
        tried += ["--parallel fsdp", "--grad_checkpoint True"]
        tried += [f"--max_packed_tokens {n}" for n in (200, 100, 50)]
        fits = []
        for flag in tried:
            name, value = flag.removeprefix("--").split()
            try:
                run.plan(available, **asked | {name: int(value) if value.isdigit() else value})
                fits.append(flag)
            except UsageError:
                continue
        # Only the largest token limit that fits is suggested.
        limits = [flag for flag in fits if "tokens" in flag]
        assert sorted(flags) == sorted(set(fits) - set(limits[1:]))
    assert ("--grad_checkpoint True" in named) == (checkpoint == "False")
    assert "--max_packed_tokens 200" in named
    if precision == "master":
        assert {"--weight_precision stochastic", "--weight_precision bf16"} <= named


def test_quantized_state_is_not_sharded(tiny_model, monkeypatch):
    run = Run(load(tiny_model), monkeypatch, ranks=2)
    too_little = {
        optim: run.plan(parallel="ddp", grad_checkpoint="True", optim=optim).total - 1
        for optim in ("sgd", "adamw_torch_8bit")
    }
    assert run.plan(too_little["sgd"], parallel="auto", optim="sgd").parallel == "fsdp"
    message = run.error(too_little["adamw_torch_8bit"], parallel="auto", optim="adamw_torch_8bit")
    assert "(ddp, " in message and "--parallel fsdp" not in message


def test_message_if_no_flag_helps(model, monkeypatch):
    text = Run(model, monkeypatch).error(1000)
    assert "the largest pack does not fit in memory\nmemory plan in GB per rank (single, 4 of 4" in text
    assert all(name in text for name in (*NAMES, "activations", "logits", "vision"))
    assert text.endswith("flags that would fit: no single flag; use more or larger GPUs, LoRA or QLoRA")


def test_8b_on_one_h100(full_8b, monkeypatch):
    """Full training needs 122.9 GB and 79.6 are available; only bf16 without masters would fit."""
    run = Run(full_8b, monkeypatch)
    flags = run.flags_named(0.95 * 78 * 2**30, weight_precision="master")
    assert flags == ["--weight_precision bf16"]
    # On eight GPUs, full training is sharded and keeps its precision.
    plan = Run(full_8b, monkeypatch, ranks=8).plan(0.95 * 78 * 2**30)
    assert plan.parallel == "fsdp" and plan.components["optimizer state"] == 12 * TRAINED // 8


def test_plan_uses_the_lowest_available_memory_across_ranks(model, monkeypatch):
    run = Run(model, monkeypatch, ranks=2)
    least = run.plan(parallel="ddp", grad_checkpoint="True").total
    monkeypatch.setattr(memory, "all_gather_object", lambda value: [value, least])
    plan = run.plan()
    assert (plan.available, plan.checkpointed_layers) == (least, 4)


def test_a_gpu_is_planned_with_a_reserve_and_a_compiled_step(model, monkeypatch):
    monkeypatch.setattr(memory, "uses_compiled_step", lambda precision, device: device == CUDA)
    plan = Run(model, monkeypatch).plan(1e11, device=CUDA)
    assert plan.available == 0.95e11 and plan.components["optimizer scratch"] == 0
    plan = Run(model, monkeypatch).plan(1e11)
    assert plan.available == 1e11 and plan.components["optimizer scratch"] > 0


# ---- the largest pack


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("max_tokens", [None, 300])
@pytest.mark.parametrize("checkpoint", ["True", "False"])
def test_the_largest_pack_of_all_ranks_and_epochs(model, monkeypatch, ranks, max_tokens, checkpoint):
    rng = np.random.default_rng(0)
    tokens = rng.integers(20, 200, 101)
    lengths = Lengths(tokens, rng.integers(1, 20, 101), rng.integers(0, 7, 101))
    activations = Activations(4, 10.0, 0.02, 1.0, 50.0, 30.0, 90.0)
    monkeypatch.setattr(memory, "measure_activations", lambda *_, **__: activations)
    monkeypatch.setattr(memory, "all_gather_object", lambda value: [1e12] * ranks)
    planner = StepPlanner(ranks, tokens, tokens, max_tokens, records_per_pack=2)
    samplers = [StepSampler([101], step_records=12, planner=planner, rank=r, seed=3) for r in range(ranks)]
    needed, packs_of_a_step = {}, 0
    # Each epoch has a different order and therefore different packs.
    for epoch, number in itertools.product(range(3), range(len(samplers[0]))):
        for sampler in samplers:
            packs = sampler.packs(epoch, number)
            packs_of_a_step = max(packs_of_a_step, len(packs))
            for keys in packs:
                records = [key.index for key in keys]
                sums = [int(c[records].sum()) for c in (tokens, lengths.supervised, lengths.tiles, tokens**2)]
                size = PackSize(*sums)
                count = {"True": 4, "False": 0}[checkpoint]
                needed[tuple(keys)] = (sum(activations.for_pack(size, count).values()), size)
    values = {"parallel": "auto", "weight_precision": "master", "optim": "adamw_torch"}
    run = run_of(ranks, count_steps=lambda n: 3 * n, **values)
    config = SimpleNamespace(run=run, model=SimpleNamespace(grad_checkpoint=checkpoint))
    plans = [
        plan_memory(config, model, sampler, SimpleNamespace(epoch_lengths=lambda: lengths))
        for sampler in samplers
    ]
    most = max(need for need, _ in needed.values())
    for plan in plans:
        assert needed[tuple(plan.sample_indices)] == (pytest.approx(most), plan.pack)
        assert plan.several_packs == (packs_of_a_step > 1)
        assert plan == plans[0]


def test_checkpointing_changes_which_pack_is_the_largest(model, monkeypatch):
    """Logits of long answers are not affected by checkpointing."""
    tokens, supervised = np.array([100, 60]), np.array([1, 60])
    monkeypatch.setattr(
        memory, "measure_activations", lambda *_, **__: Activations(4, 10.0, 0, 1.0, 20.0, 0, 0)
    )
    config = SimpleNamespace(
        run=run_of(count_steps=lambda n: n, parallel="auto", weight_precision="bf16", optim="adamw_torch"),
        model=SimpleNamespace(grad_checkpoint="False"),
    )
    data = SimpleNamespace(epoch_lengths=lambda: Lengths(tokens, supervised, tokens * 0))
    sampler = StepSampler([2], step_records=2, planner=StepPlanner(1, tokens, tokens, 100))
    assert plan_memory(config, model, sampler, data).pack.tokens == 100  # 5020 and 4200
    config.model.grad_checkpoint = "True"
    assert plan_memory(config, model, sampler, data).pack.tokens == 60  # 2420 and 2640


# ---- available memory


def test_available_gpu_memory_includes_own_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 30)
    assert available_memory(CUDA) == available_memory(CUDA, 8) == 90


@pytest.mark.parametrize(("local_ranks", "available"), [(1, 101), (4, 26)])
def test_ranks_of_a_node_share_its_free_memory(monkeypatch, local_ranks, available):
    """100 GB are free, and this process uses 1 GB."""
    monkeypatch.setattr(memory, "available_host_memory", lambda: 100 * 10**9)
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: SimpleNamespace(rss=10**9))
    assert available_memory(CPU, local_ranks) == available * 10**9


def test_ranks_in_a_container_share_its_limit(monkeypatch, tmp_path):
    """90 GB are free on the node; the cgroup allows 40, of which 10 are used, 2 of them page cache."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=90 * 10**9))
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: SimpleNamespace(rss=10**9))
    monkeypatch.setattr(hardware, "_CGROUPS", tmp_path)
    monkeypatch.setattr(hardware, "_OWN_CGROUPS", tmp_path / "own")
    files = {"own": "0::/", "memory.max": "40", "memory.current": "10", "memory.stat": "inactive_file 2"}
    for name, text in files.items():
        (tmp_path / name).write_text(f"{text}000000000\n" if text[-1].isdigit() else f"{text}\n")
    assert available_memory(CPU, 2) == (32 // 2 + 1) * 10**9


def test_a_plan_can_be_compared_and_read(model, monkeypatch):
    """Ranks exchange only their memory, so their plans must compare equal."""
    run = Run(model, monkeypatch, ranks=2)
    assert run.plan() == run.plan()
    assert json.dumps(run.plan().components)
