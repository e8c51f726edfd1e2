"""`m3llm plan`: predict memory, time, checkpoints and cost of a training run, and print its command."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from internvl_chat.commands.common import add_data_root, positive
from internvl_chat.commands.output import echo, print_json, print_table
from internvl_chat.utils.errors import UsageError
from internvl_chat.utils.gpus import GPUS

if TYPE_CHECKING:
    from internvl_chat.train.planning.estimate import Estimate, PlannedModel
    from internvl_chat.train.planning.hardware import Hardware
    from internvl_chat.train.planning.report import PlanReport
    from internvl_chat.train.planning.workload import Workload

_CPU = "cpu"
# Training flags that are not allowed after `--`, and why.
_REJECTED = {
    **dict.fromkeys(("parallel", "deepspeed", "fsdp"), "the plan compares all layouts"),
    **dict.fromkeys(
        ("per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_size"),
        "use --batch_size",
    ),
    "cpu_offload": "its speed cannot be planned; training checks whether it fits",
    "data_root": "put it before --",
    "image_root": "put it before --",
    "meta_path": "use --meta",
    "model_name_or_path": "use --model",
    "use_cpu": f"use --gpu {_CPU}",
}
# GPUs per node in the plot if `--gpus` is 1.
_GPUS_PER_NODE = 8
_MAXIMUM = {
    "tokens": 1_000_000,
    "tiles": 1000,
    "batch_size": 10_000_000,
    "gpus": 100_000,
    "nodes": 100_000,
}
_NUMBERS = ("memory_gb", "tflops", "bandwidth_gbs", "link_gbs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `plan`."""
    add = parser.add_argument
    add("--model", default="OpenGVLab/InternVL3-8B",
        help="model folder, config.json, hub id or name of a published model; weights are not read (default: "
        "OpenGVLab/InternVL3-8B)")  # fmt: skip
    add("--recipe", choices=("lora", "full"), default="lora", help="recipe of the launcher (default: lora)")
    data = parser.add_argument_group("data (default: the published training set)")
    data.add_argument("--meta", help="meta file; its records are checked and measured as before training")
    add_data_root(parser)
    data.add_argument("--records", type=positive, metavar="N", help="records per epoch")
    data.add_argument("--tokens", type=_number, metavar="N", help="mean tokens per record, with image tokens")
    data.add_argument("--tiles", type=_number, metavar="N", help="mean tiles per record (default: 2)")
    hardware = parser.add_argument_group("hardware")
    hardware.add_argument("--gpu", metavar="NAME",
        help=f"{', '.join(gpu.name for gpu in GPUS)}, or {_CPU} (default: h200)")  # fmt: skip
    hardware.add_argument("--gpus", type=positive, default=1, metavar="N", help="GPUs per node (default: 1)")
    hardware.add_argument("--nodes", type=positive, default=1, metavar="N", help="nodes (default: 1)")
    for name, meaning in (
        ("memory_gb", "memory per GPU in GB"),
        ("tflops", "dense bf16 TFLOP/s per GPU"),
        ("bandwidth_gbs", "memory bandwidth in GB/s"),
        ("link_gbs", "bandwidth between the GPUs of a node in GB/s, per direction"),
    ):
        hardware.add_argument(f"--{name}", type=_number, metavar="N", help=f"{meaning} (default: from --gpu)")
    hardware.add_argument("--network_gbs", type=_number, metavar="N", default=50.0,
        help="bandwidth per GPU to other nodes in GB/s (default: 50)")  # fmt: skip
    hardware.add_argument("--disk_gbs", type=_number, metavar="N", default=1.0,
        help="write bandwidth for checkpoints in GB/s (default: 1)")  # fmt: skip
    hardware.add_argument("--price_per_hour", type=_number, metavar="N", help="price per GPU and hour")
    add("--batch_size", type=positive, metavar="N",
        help="records per step across all ranks (default: 16 for lora, 2 for full; other values change the "
        "training)")  # fmt: skip
    add("--plot", type=Path, metavar="FILE.png",
        help="plot time and cost against GPUs, records, tokens, tiles and model size")  # fmt: skip
    add("--json", action="store_true", help="print one JSON object")
    add("flags", nargs="*", metavar="-- FLAGS",
        help="training flags, such as -- --weight_precision bf16 --max_dynamic_patch 1")  # fmt: skip


def _number(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e15:
        raise argparse.ArgumentTypeError(f"must be a positive number, found {text}")
    return value


def run(args: argparse.Namespace) -> int:
    """Print the plan and save the plot; return 1 if no mode fits."""
    _check(args)
    from internvl_chat.train.planning.advice import plan_notes
    from internvl_chat.train.planning.estimate import Planner, recommend, usable_ranks
    from internvl_chat.train.planning.plot import save_plot
    from internvl_chat.train.planning.report import PlanReport

    planned, workload, hardware = _prepare(args)
    batch_size = args.batch_size or planned.config.run.records_per_step
    gpus, nodes = usable_ranks(batch_size, args.gpus, args.nodes)
    planner = Planner(planned, workload, hardware)
    estimates = planner.compare(gpus * nodes, nodes, batch_size)
    best = recommend(estimates)
    title, limits = f"{args.model}, recipe {args.recipe}, {hardware.name}", []
    if args.plot:
        per_node = args.gpus if args.gpus > 1 else _GPUS_PER_NODE
        limits = save_plot(planner, title, batch_size, per_node, best, args.plot)
    report = PlanReport(
        args.model, args.recipe, args.gpus, args.nodes, planner, estimates, best,
        command=None if best is None else _command(args, best, gpus),
        notes=plan_notes(planner, estimates, best, args.gpus, args.nodes),
        limits=limits,
    )  # fmt: skip
    if args.json:
        print_json(report.to_dict())
    else:
        _print(report, args.plot)
    return 1 if best is None else 0


def _print(report: PlanReport, plot: Path | None) -> None:
    """Print the plan as text and tables."""
    for line in report.summary():
        echo(line)
    echo(f"\nmemory per rank in GB, of {report.estimates[0].memory.available / 1e9:.1f} usable")
    print_table(*report.memory_table())
    echo("\nspeed and cost of an epoch; size of a checkpoint and time to write it")
    print_table(*report.speed_table())
    echo()
    for note in [*report.notes, *report.limits]:
        echo(f"- {note}")
    if plot:
        echo(f"plot: {plot}")
    if report.best is not None:
        echo(f"\nrecommended: {report.best.mode.name}\n{report.command}")


def _check(args: argparse.Namespace) -> None:
    """Check the arguments that argparse cannot.

    Raises:
        UsageError: lists all problems.
    """
    problems, names = [], [gpu.name for gpu in GPUS]
    missing = [f"--{name}" for name in _NUMBERS if vars(args)[name] is None]
    if args.gpu is not None and args.gpu.lower() not in (*names, _CPU):
        numbers = ", ".join(f"--{name}" for name in _NUMBERS)
        problems.append(f"--gpu {args.gpu}: unknown; use {', '.join(names)} or {_CPU}, or give {numbers}")
    if args.gpu is None and 0 < len(missing) < len(_NUMBERS):
        problems.append(f"{' and '.join(missing)}: required without --gpu")
    given = [f"--{name}" for name in ("records", "tokens", "tiles") if vars(args)[name] is not None]
    if args.meta and given:
        problems.append(f"{' and '.join(given)}: not allowed with --meta, whose records are measured")
    if args.flags and not args.flags[0].startswith("-"):
        problems.append(
            f"unexpected argument {args.flags[0]!r}; pass a meta file with --meta, training flags after --"
        )
    for flag in (flag.split("=")[0] for flag in args.flags if flag.startswith("--")):
        if reason := _REJECTED.get(flag[2:].replace("-", "_")):
            problems.append(f"{flag}: not allowed after --; {reason}")
    for name, maximum in _MAXIMUM.items():
        if (vars(args)[name] or 0) > maximum:
            problems.append(f"--{name} {vars(args)[name]:g}: must be at most {maximum:,}")
    if args.tiles is not None and args.tokens is None:
        problems.append("--tiles requires --tokens")
    if args.plot and not args.plot.absolute().parent.is_dir():
        problems.append(f"--plot {args.plot}: the folder {args.plot.parent} does not exist")
    if args.plot and args.plot.suffix.lower() != ".png":
        problems.append(f"--plot {args.plot}: must end in .png")
    if problems:
        raise UsageError(problems)


def _prepare(args: argparse.Namespace) -> tuple[PlannedModel, Workload, Hardware]:
    """Return the model, the records and the hardware of the arguments."""
    import torch

    from internvl_chat.data.encode.encoder import RecordEncoder
    from internvl_chat.data.encode.tokenizer import load_tokenizer
    from internvl_chat.data.sources.meta import load_meta
    from internvl_chat.train.arguments import parse_arguments
    from internvl_chat.train.checks import flag_problems
    from internvl_chat.train.planning.estimate import PlannedModel
    from internvl_chat.train.planning.models import find_model
    from internvl_chat.train.planning.modes import recipe_file
    from internvl_chat.train.planning.workload import (
        PUBLISHED_RECORDS,
        meta_workload,
        published_workload,
        uniform_workload,
    )
    from internvl_chat.train.setup import plan_preprocessing

    on_cpu = (args.gpu or "").lower() == _CPU
    kind = "cpu" if on_cpu else "cuda"
    paths = ["--model_name_or_path", args.model, "--meta_path", args.meta or "meta", "--output_dir", "plan"]
    # Without a GPU, the flags can only be read for a CPU.
    device = ["--use_cpu", "True", *(["--bf16", "False"] if on_cpu else [])]
    config = parse_arguments([str(recipe_file(args.recipe)), *paths, *device, *args.flags])
    if config.model.attn != "auto" or not (on_cpu or config.run.bf16):
        raise UsageError("only --attn auto and, on GPUs, --bf16 True can be planned; remove these flags")
    run = dataclasses.replace(config.run, device=torch.device(kind))
    if problems := list(flag_problems(dataclasses.replace(config, run=run))):
        raise UsageError(problems)
    specs = load_meta(args.meta, args.data_root, args.image_root) if args.meta else []
    model_config, folder = find_model(args.model, needs_tokenizer=args.meta is not None)
    planned = PlannedModel.build(config, model_config, kind, specs)
    per_tile = planned.model.config.tokens_per_tile
    if folder is not None and args.meta:
        preprocessing = plan_preprocessing(model_config, config, specs)
        preprocessing = preprocessing.with_tile_limit(config.data.max_dynamic_patch)
        tokenizer, _ = load_tokenizer(folder)
        encoder = RecordEncoder(tokenizer, preprocessing, truncate_text=config.data.truncate_text)
        workload = meta_workload(specs, encoder)
    elif args.tokens:
        tiles = 2.0 if args.tiles is None else args.tiles
        workload = uniform_workload(args.records or PUBLISHED_RECORDS, args.tokens, tiles, per_tile)
    else:
        workload = published_workload(config.data.max_dynamic_patch, per_tile, args.records)
    return planned, workload, _hardware(args, "bfloat16" if config.run.bf16 else "float32")


def _hardware(args: argparse.Namespace, dtype: str) -> Hardware:
    """Return the hardware given by the name of a GPU, by numbers, or by both."""
    from internvl_chat.train.planning.hardware import cpu_hardware, gpu_hardware
    from internvl_chat.utils.hardware import available_host_memory, cpu_cores

    numbers = {name: vars(args)[name] for name in _NUMBERS if vars(args)[name] is not None}
    name = (args.gpu or "h200").lower()
    if name == _CPU:
        memory = numbers["memory_gb"] * 1e9 if "memory_gb" in numbers else available_host_memory() / args.gpus
        cores = max(1, cpu_cores() // args.gpus)
        return cpu_hardware(dtype, memory, cores, disk=args.disk_gbs, price=args.price_per_hour)
    gpu = next(gpu for gpu in GPUS if gpu.name == name)
    if args.gpu is None and numbers:
        gpu = gpu._replace(name="custom GPU")
    gpu = gpu._replace(**numbers)
    return gpu_hardware(gpu, network=args.network_gbs, disk=args.disk_gbs, price=args.price_per_hour)


def _command(args: argparse.Namespace, best: Estimate, gpus: int) -> str:
    """Return the launcher command of a mode."""
    from internvl_chat.train.planning.models import launcher_path
    from internvl_chat.train.planning.modes import launcher_command

    paths, flags = {"MODEL_PATH": launcher_path(args.model)}, args.flags
    if args.meta:
        paths |= {"META_PATH": args.meta, "DATA_ROOT": str(args.data_root)}
        flags = [*(["--image_root", args.image_root] if args.image_root else []), *flags]
    device = _CPU if (args.gpu or "").lower() == _CPU else "cuda"
    return launcher_command(
        args.recipe, best.mode, device=device, gpus=gpus, nodes=best.nodes, batch_size=best.batch_size,
        paths=paths, flags=flags,
    )  # fmt: skip
