"""Hardware of a plan: data-sheet values, and the fractions of them that training achieves.

The achieved fractions come from `calibration.json`, which `benchmarks/plan_accuracy.py --calibrate` writes
from the measurements in `benchmarks/results/`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from internvl_chat.utils.gpus import Gpu

_CALIBRATION = Path(__file__).with_name("calibration.json")
GB = 1e9
# Bandwidth to other nodes per GPU in GB/s: a 400 Gbit/s adapter for each GPU.
DEFAULT_NETWORK_GBS = 50.0
# Write bandwidth of the checkpoint disk in GB/s, shared by all ranks.
DEFAULT_DISK_GBS = 1.0


@dataclass(frozen=True)
class Efficiency:
    """Achieved fractions of the hardware's peak values.

    Attributes:
        compute: fraction of the peak FLOP/s in the forward and backward passes.
        memory: fraction of the memory bandwidth in the optimizer step.
        link: fraction of the interconnect bandwidth in collective operations.
        overlap: fraction of the duration of the passes during which communication is hidden.
        step_seconds: fixed time per step and rank.
        pack_seconds: fixed time per pack.
        source: measurements that the values are derived from, or the reason for assuming them.
        measured: whether `compute` was measured on this kind of device.
    """

    compute: float
    memory: float
    link: float
    overlap: float
    step_seconds: float
    pack_seconds: float
    source: str
    measured: bool


@dataclass(frozen=True)
class Hardware:
    """One rank's device and its connections; sizes in bytes, rates in bytes (or FLOPs) per second.

    Attributes:
        name: name in messages and plots.
        device: `cuda` or `cpu`.
        memory: memory per rank.
        flops: peak FLOP/s per rank.
        bandwidth: memory bandwidth per rank.
        link: bandwidth to the other ranks of a node.
        network: bandwidth to other nodes, per rank.
        disk: write bandwidth of the checkpoint folder.
        price: price per device and hour; None if unknown.
    """

    name: str
    device: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    network: float
    disk: float
    price: float | None
    efficiency: Efficiency


@cache
def _calibration() -> Mapping[str, Any]:
    return json.loads(_CALIBRATION.read_text(encoding="utf-8"))


def find_efficiency(device: str, gpu_name: str = "") -> Efficiency:
    """Return the measured or assumed efficiency of a device.

    Args:
        device: `cuda`, `cpu-float32` or `cpu-bfloat16`.
        gpu_name: `Gpu.name`; if this GPU was measured, its values are returned.
    """
    known = _calibration()["efficiency"]
    return Efficiency(**known.get(gpu_name, known[device]))


def gpu_hardware(gpu: Gpu, *, network: float, disk: float, price: float | None) -> Hardware:
    """Return the hardware of a rank on a GPU.

    Args:
        gpu: data-sheet values.
        network: bandwidth to other nodes in GB/s.
        disk: write bandwidth of the checkpoint folder in GB/s.
        price: price per GPU and hour.
    """
    return Hardware(
        name=gpu.name,
        device="cuda",
        memory=gpu.memory_gb * GB,
        flops=gpu.tflops * 1e12,
        bandwidth=gpu.bandwidth_gbs * GB,
        link=gpu.link_gbs * GB,
        network=network * GB,
        disk=disk * GB,
        price=price,
        efficiency=find_efficiency("cuda", gpu.name),
    )


def cpu_hardware(dtype: str, memory: float, cores: int = 1, *, disk: float, price: float | None) -> Hardware:
    """Return the hardware of a rank on CPU cores; speed and bandwidth are those measured for calibration.

    Args:
        dtype: `float32` or `bfloat16`.
        memory: memory per rank in bytes.
        cores: cores per rank.
        disk: write bandwidth of the checkpoint folder in GB/s.
        price: price per rank and hour.
    """
    machine = _calibration()["cpu"][dtype]
    return Hardware(
        name="cpu",
        device="cpu",
        memory=memory,
        flops=machine["flops_per_core"] * cores,
        bandwidth=machine["memory_bandwidth"],
        link=machine["memory_bandwidth"],
        network=machine["memory_bandwidth"],
        disk=disk * GB,
        price=price,
        efficiency=find_efficiency(f"cpu-{dtype}"),
    )
