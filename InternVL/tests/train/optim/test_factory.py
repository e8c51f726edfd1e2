"""Optimizers, weight decay and schedules match transformers; unsupported ones are rejected."""

import itertools
import json
import math
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from helpers import needs_bitsandbytes, needs_torchao
from torch import nn
from transformers import SchedulerType, TrainingArguments, get_scheduler
from transformers.optimization import Adafactor
from transformers.training_args import OptimizerNames

from internvl_chat.model.modeling_internvl_chat import InternVLChatModel
from internvl_chat.model.tiny import TinyShape, tiny_config
from internvl_chat.train.checkpoint.optimizer_state import named_state
from internvl_chat.train.config import resolve_run
from internvl_chat.train.flags import RunArguments
from internvl_chat.train.optim import factory
from internvl_chat.train.optim.adamw import Float32AdamW
from internvl_chat.train.optim.factory import (
    OWN_OPTIMIZERS,
    flags_without_effect,
    make_optimizer,
    make_scheduler,
    optimizer_problems,
    scheduled_rate,
    state_bytes,
    uses_compiled_step,
)
from internvl_chat.utils.errors import UsageError

SHAPE = TinyShape(
    image_size=56, vision_width=32, vision_layers=2, vision_heads=2, width=64, layers=2, heads=4, kv_heads=2
)


def resolve(**flags):
    return resolve_run(RunArguments(output_dir="out", use_cpu=True, **flags), [])


def make_model(**vision):
    raw = tiny_config(SHAPE, 64).to_dict()
    raw["vision_config"].update(vision)
    return InternVLChatModel(type(tiny_config(SHAPE, 64)).from_dict(raw), 60, "sdpa")


def two_layers(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4), nn.LayerNorm(4)).to(dtype)


def step(optimizer, model):
    model(torch.tensor([1, 2])).float().square().sum().backward()
    optimizer.step()


class TestOptimizer:
    @pytest.mark.parametrize("name", OWN_OPTIMIZERS)
    @pytest.mark.parametrize("precision", ["master", "stochastic"])
    def test_own_adamw(self, name, precision):
        run = resolve(
            optim=name, bf16=True, weight_precision=precision, learning_rate=1e-4, weight_decay=0.1, seed=7,
            adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6,
        )  # fmt: skip
        optimizer = make_optimizer(run, two_layers(torch.bfloat16))
        assert type(optimizer) is Float32AdamW
        assert optimizer.stochastic == (precision == "stochastic") and not optimizer.compiled
        group = optimizer.param_groups[0]
        assert (group["lr"], group["betas"], group["eps"], group["seed"]) == (1e-4, (0.8, 0.95), 1e-6, 7)
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]

    def test_deepspeed_keeps_the_masters(self):
        run = resolve(bf16=True, deepspeed='{"zero_optimization": {"stage": 1}}', parallel="deepspeed")
        assert type(make_optimizer(run, two_layers(torch.bfloat16))) is torch.optim.AdamW

    def test_lost_updates_are_reported(self, caplog):
        make_optimizer(resolve(optim="sgd"), two_layers())
        make_optimizer(resolve(bf16=True), two_layers(torch.bfloat16))
        assert not caplog.messages
        make_optimizer(resolve(optim="sgd", bf16=True), two_layers(torch.bfloat16))
        assert "--optim sgd: bf16 weights are updated without float32 masters" in caplog.text

    @pytest.mark.parametrize(
        ("name", "cls"),
        [("adafactor", Adafactor), ("sgd", torch.optim.SGD), ("adagrad", torch.optim.Adagrad),
         ("rmsprop", torch.optim.RMSprop)],
    )  # fmt: skip
    def test_optimizers_of_torch_and_transformers(self, name, cls):
        model = two_layers()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = make_optimizer(resolve(optim=name, learning_rate=0.01, weight_decay=0.05), model)
        step(optimizer, model)
        assert type(optimizer) is cls
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]
        assert {group["lr"] for group in optimizer.param_groups} == {0.01}
        assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

    def test_options_of_an_optimizer(self):
        optimizer = make_optimizer(
            resolve(optim="sgd", optim_args="momentum=0.9,nesterov=true"), two_layers()
        )
        assert (optimizer.defaults["momentum"], optimizer.defaults["nesterov"]) == (0.9, True)

    @pytest.mark.parametrize(
        ("name", "given", "problem"),
        [
            ("sgd", "momentum", "--optim_args momentum: must be name=value,name=value"),
            (
                "sgd",
                "momentum=much",
                "--optim sgd --optim_args momentum=much: could not convert string to float",
            ),
            ("sgd", "momentum=-1", "--optim sgd --optim_args momentum=-1: Invalid momentum value: -1.0"),
            ("sgd", "momentum=nan", "--optim sgd --optim_args momentum=nan: momentum must be finite"),
            ("sgd", "nesterov=True", "--optim sgd --optim_args nesterov=True: Nesterov momentum requires"),
            ("sgd", "momentum=0.9, foo=1", "--optim_args foo=1: has no effect with --optim sgd"),
            ("sgd", "momentum=0.9,weight_decay=0.1", "--optim_args weight_decay=0.1: has no effect"),
            ("adagrad", "lr=1,eps=1e-8", "--optim_args lr=1: has no effect with --optim adagrad"),
            ("adafactor", "relative_step=True", "--optim_args relative_step=True: has no effect"),
            ("adamw_torch", "foo=1", "--optim_args foo=1: adamw_torch has no options; use --adam_beta1"),
            ("adamw_torch_fused", "beta1=0.9", "--optim_args beta1=0.9: adamw_torch_fused has no options"),
        ],
    )
    def test_invalid_optimizer_options(self, name, given, problem):
        [found] = optimizer_problems(resolve(optim=name, optim_args=given))
        assert found.startswith(problem)

    @pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
    def test_missing_optimizer_package(self):
        run = resolve(optim="lion_32bit")
        with pytest.raises(
            UsageError, match=r"--optim lion_32bit: .*pip install -U bitsandbytes.*adamw_torch"
        ):
            make_optimizer(run, two_layers())
        assert len(list(optimizer_problems(run))) == 1

    @needs_torchao
    @pytest.mark.parametrize("name", ["adamw_torch_8bit", "adamw_torch_4bit"])
    def test_bytes_of_quantized_state(self, name):
        model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 3))
        optimizer = make_optimizer(resolve(optim=name), model)
        torch.compiler.set_stance("force_eager")  # torchao compiles its step
        try:
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        finally:
            torch.compiler.set_stance("default")
        tensors = {key: t for key, t in named_state(model, optimizer)[0].items()
                   if not key.endswith(("/step", ".qmap"))}  # fmt: skip
        assert state_bytes(name, "bf16", model.parameters()) == sum(t.nbytes for t in tensors.values())

    def test_bytes_of_other_state(self):
        weights = [torch.zeros(64, 128), torch.zeros(3, dtype=torch.bfloat16)]
        assert state_bytes("adamw_torch", "master", weights) == 8 * 64 * 128 + 12 * 3
        assert state_bytes("adafactor", "bf16", weights) == 8 * 64 * 128 + 4 * 3

    @pytest.mark.parametrize(
        "layout", [{"parallel": "fsdp"}, {"deepspeed": '{"zero_optimization": {"stage": 1}}'}]
    )
    def test_quantized_state_cannot_be_sharded(self, layout):
        problems = list(optimizer_problems(resolve(optim="adamw_torch_8bit", **layout)))
        assert problems[0].startswith(
            "--optim adamw_torch_8bit: 8-bit and 4-bit optimizer state cannot be sharded"
        )

    def test_advice_for_quantized_state_with_offload(self):
        """`--parallel ddp` is no remedy, because it does not support `--cpu_offload`."""
        problems = optimizer_problems(resolve(optim="adamw_torch_8bit", cpu_offload=True))
        assert not any("--parallel ddp" in problem for problem in problems)

    @needs_torchao
    def test_stochastic_rounding_needs_a_single_rank(self, monkeypatch):
        options = {"optim": "adamw_torch_8bit", "optim_args": "bf16_stochastic_round=True"}
        assert not list(optimizer_problems(resolve(**options)))
        monkeypatch.setenv("WORLD_SIZE", "2")
        [problem] = optimizer_problems(resolve(**options))
        assert "ranks would round differently" in problem

    @needs_bitsandbytes
    def test_embeddings_keep_32_bit_state(self):
        model = nn.Sequential(nn.Embedding(8192, 4), nn.Linear(4, 4096))
        optimizer = make_optimizer(resolve(optim="lion_8bit"), model)
        step(optimizer, model)
        states = {name: optimizer.state[p]["state1"].dtype for name, p in model.named_parameters()}
        assert states["0.weight"] == torch.float32 and states["1.weight"] == torch.uint8

    def test_every_optimizer_of_transformers_works_or_is_rejected(self):
        for name in OptimizerNames:
            run = resolve(optim=name.value)
            try:
                make_optimizer(run, two_layers())
            except UsageError as error:
                assert f"--optim {name.value}: " in str(error) and "use adamw_torch" in str(error)
                assert list(optimizer_problems(run)) == error.problems
            else:
                assert not list(optimizer_problems(run))

    @pytest.mark.parametrize("name", ["lomo", "adalomo", "galore_adamw", "apollo_adamw", "schedule_free_sgd"])
    def test_optimizers_that_need_a_different_loop_are_rejected(self, name):
        with pytest.raises(UsageError, match=f"--optim {name}: not supported"):
            make_optimizer(resolve(optim=name), two_layers())


class TestCompiledStep:
    def test_not_compiled_on_a_cpu(self):
        assert not uses_compiled_step("master", torch.device("cpu"))

    @pytest.mark.parametrize("precision", ["master", "stochastic", "bf16"])
    @pytest.mark.parametrize("other_rank_fails", [False, True])
    def test_compiled_on_a_gpu_if_every_rank_can_compile(self, monkeypatch, precision, other_rank_fails):
        monkeypatch.setattr(factory, "_can_compile", lambda precision, device: True)
        monkeypatch.setattr(factory, "any_rank", lambda fails: fails or other_rank_fails)
        uses_compiled_step.cache_clear()
        used = uses_compiled_step(precision, torch.device("cuda", 0))
        uses_compiled_step.cache_clear()
        assert used == (precision != "bf16" and not other_rank_fails)

    def test_compiled_by_default_on_a_gpu(self, monkeypatch):
        monkeypatch.setattr(factory, "uses_compiled_step", lambda precision, device: True)
        optimizer = make_optimizer(resolve(bf16=True, torch_compile=False), two_layers(torch.bfloat16))
        assert optimizer.compiled

    @pytest.mark.parametrize("precision", ["master", "stochastic"])
    def test_compiler_failure_is_reported(self, monkeypatch, caplog, precision):
        def fail(*_):
            raise RuntimeError("Failed to find C compiler")

        assert factory._can_compile(precision, torch.device("cpu"))
        monkeypatch.setattr("internvl_chat.train.optim.adamw.fused_step", fail)
        assert not factory._can_compile(precision, torch.device("cpu"))
        assert "the optimizer step cannot be compiled" in caplog.text
        assert "Failed to find C compiler" in caplog.text


def rates(scheduler, optimizer, steps):
    """Return the learning rates of the first steps."""
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


OPTIONS = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"lr_end": 0.1, "power": 2.0},
    "warmup_stable_decay": {"num_decay_steps": 10},
}


class TestSchedule:
    def make(self, total_steps=100, **flags):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        return rates(make_scheduler(resolve(**flags), optimizer, total_steps), optimizer, total_steps)

    def test_schedule_of_the_recipe(self):
        """3 % of 70 steps is 2.1: three warm-up steps, then a cosine decay to zero."""
        found = self.make(total_steps=70, lr_scheduler_type="cosine", warmup_ratio=0.03)
        warmup = [0, 1 / 3, 2 / 3]
        cosine = [0.5 * (1 + math.cos(math.pi * i / 67)) for i in range(67)]
        assert found == pytest.approx(warmup + cosine, abs=1e-12)

    @pytest.mark.parametrize("warmup", [0, 0.03, 0.5, 1, 7, 7.5])
    @pytest.mark.parametrize("total", [1, 2, 70, 118_874])
    def test_warmup_steps_match_transformers(self, monkeypatch, warmup, total):
        seen = []
        monkeypatch.setattr(factory, "get_scheduler", lambda *arguments, **_: seen.append(arguments))
        make_scheduler(resolve(warmup_steps=warmup), None, total)
        arguments = SimpleNamespace(warmup_steps=warmup)
        assert seen == [("linear", None, TrainingArguments.get_warmup_steps(arguments, total), total)]

    @pytest.mark.parametrize("name", [one.value for one in SchedulerType])
    def test_every_schedule_of_transformers_works_or_is_rejected(self, name):
        options = OPTIONS.get(name, {})
        flags = {"lr_scheduler_type": name, "lr_scheduler_kwargs": json.dumps(options), "warmup_steps": 5,
                 "learning_rate": 1.0}  # fmt: skip
        if name in ("reduce_lr_on_plateau", "greedy"):
            with pytest.raises(
                UsageError, match=f"--lr_scheduler_type {name}: not supported, because it needs a metric"
            ):
                self.make(**flags)
            return
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        expected = get_scheduler(name, optimizer, 5, 100, scheduler_specific_kwargs=options)
        assert self.make(**flags) == rates(expected, optimizer, 100)
        assert not list(optimizer_problems(resolve(**flags)))

    @pytest.mark.parametrize(
        "name", sorted({one.value for one in SchedulerType} - {"reduce_lr_on_plateau", "greedy"})
    )
    def test_rate_of_a_single_step(self, name):
        """`scheduled_rate` matches a scheduler that has run all earlier steps."""
        flags = {"lr_scheduler_type": name, "lr_scheduler_kwargs": json.dumps(OPTIONS.get(name, {})),
                 "warmup_steps": 5, "learning_rate": 1.0}  # fmt: skip
        expected = self.make(**flags)
        assert [scheduled_rate(resolve(**flags), 100, step + 1) for step in range(100)] == expected

    @pytest.mark.parametrize("name", [one.value for one in SchedulerType])
    def test_unknown_and_missing_schedule_options(self, name):
        if name in ("reduce_lr_on_plateau", "greedy"):
            return
        options = OPTIONS.get(name, {})
        for own in ("color", "last_epoch", "num_training_steps"):
            run = resolve(lr_scheduler_type=name, lr_scheduler_kwargs=json.dumps({**options, own: 1}))
            [problem] = optimizer_problems(run)
            assert problem.startswith(
                f"--lr_scheduler_kwargs {own}: {name} has no such option; its options: "
            )
            assert all(option in problem for option in options)
        needs_options = name in ("cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay")
        assert len(list(optimizer_problems(resolve(lr_scheduler_type=name)))) == needs_options

    @pytest.mark.parametrize(
        ("name", "options", "problem"),
        [
            ("cosine", {"num_cycles": "two"}, "could not convert string to float: 'two'"),
            ("cosine", {"num_cycles": None}, "float() argument must be a string or a real number"),
            ("polynomial", {"power": "2"}, "unsupported operand"),
            ("polynomial", {"power": -2}, "times --learning_rate"),
            ("polynomial", {"lr_end": 1}, "must be smaller than initial lr"),
            ("polynomial", {"lr_end": -1}, "times --learning_rate"),
            ("inverse_sqrt", {"timescale": -5}, "times --learning_rate"),
            ("cosine_with_min_lr", {"min_lr": "1e-6"}, "unsupported operand"),
            ("cosine_with_min_lr", {"min_lr": 1}, "times --learning_rate"),
            ("cosine_with_min_lr", {"min_lr": 0, "min_lr_rate": 0}, "Only one of"),
            ("warmup_stable_decay", {"num_decay_steps": 100}, "exceed the total of 12"),
            ("warmup_stable_decay", {"num_decay_steps": "2"}, "unsupported operand"),
            ("warmup_stable_decay", {"num_decay_steps": 2, "decay_type": "exp"}, "Unknown decay type: exp"),
        ],
    )  # fmt: skip
    def test_invalid_schedule_options(self, name, options, problem):
        """Includes options that fail only after the warm-up."""
        run = resolve(
            lr_scheduler_type=name, lr_scheduler_kwargs=json.dumps(options), max_steps=12, warmup_steps=8,
            learning_rate=1e-3,
        )  # fmt: skip
        [found] = optimizer_problems(run)
        assert (
            found.startswith(f"--lr_scheduler_type {name}: ")
            and problem in found
            and found.endswith("; check --lr_scheduler_kwargs")
        )

    def test_all_problems_are_reported_together(self):
        run = resolve(optim="lomo", lr_scheduler_type="greedy")
        assert [problem.split(":")[0] for problem in optimizer_problems(run)] == [
            "--optim lomo",
            "--lr_scheduler_type greedy",
        ]

    def test_the_schedule_resumes(self):
        flags = {"lr_scheduler_type": "cosine", "warmup_steps": 5}
        whole = self.make(**flags)
        optimizers = [torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0) for _ in range(2)]
        first, second = (make_scheduler(resolve(**flags), optimizer, 100) for optimizer in optimizers)
        found = rates(first, optimizers[0], 30)
        second.load_state_dict(first.state_dict())
        optimizers[1].load_state_dict(optimizers[0].state_dict())
        assert list(itertools.chain(found, rates(second, optimizers[1], 70))) == whole


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"lr_scheduler_type": "constant", "warmup_steps": 50}, ["--warmup_steps"]),
        ({"lr_scheduler_type": "constant", "warmup_ratio": 0.1}, ["--warmup_steps"]),
        ({"lr_scheduler_type": "constant"}, []),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 50}, []),
        ({"lr_scheduler_type": "cosine", "warmup_ratio": 0.03, "adam_beta2": 0.95}, []),
        ({"optim": "adafactor", "adam_beta1": 0.5}, ["--adam_beta1"]),
        ({"optim": "adafactor"}, []),
        ({"optim": "sgd", "adam_epsilon": 1.0, "adam_beta2": 0.5}, ["--adam_beta2", "--adam_epsilon"]),
    ],
    ids=str,
)
def test_flags_without_effect(flags, named):
    assert [line.split()[0] for line in flags_without_effect(resolve(**flags))] == named
