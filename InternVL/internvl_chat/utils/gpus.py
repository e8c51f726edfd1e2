"""Data-sheet values of GPUs: memory, bf16 FLOP/s, memory bandwidth and interconnect bandwidth."""

from typing import NamedTuple


class Gpu(NamedTuple):
    """Data-sheet values of a GPU.

    Attributes:
        name: name on the command line.
        device_name: substring of the device name reported by the driver.
        memory_gb: memory in GB.
        tflops: dense bf16 FLOP/s with float32 accumulation, in units of 1e12 (no sparsity).
        bandwidth_gbs: memory bandwidth in GB/s.
        link_gbs: bandwidth to the other GPUs of a node in GB/s, per direction: NVLink, otherwise PCIe.
        source: page or document with these values.
    """

    name: str
    device_name: str
    memory_gb: float
    tflops: float
    bandwidth_gbs: float
    link_gbs: float
    source: str


_SITE = "https://www.nvidia.com/en-us/data-center"
_AMPERE = "NVIDIA Ampere GA102 GPU architecture whitepaper, appendix A"
_ADA = "NVIDIA Ada GPU architecture whitepaper, appendix A"

# For a device name, the first entry whose `device_name` is part of it applies. Data sheets give twice these
# bf16 FLOP/s (with sparsity) and NVLink bandwidths (both directions together).
GPUS = (
    Gpu("h200", "H200", 141, 989, 4800, 450, f"{_SITE}/h200/"),
    Gpu("h100-pcie", "H100 PCIe", 80, 756, 2000, 64, f"{_SITE}/h100/"),
    Gpu("h100", "H100", 80, 989, 3350, 450, f"{_SITE}/h100/"),
    Gpu("h800", "H800", 80, 989, 3350, 200, "NVIDIA H800 Tensor Core GPU data sheet"),
    Gpu("b200", "B200", 180, 2250, 8000, 900, f"{_SITE}/dgx-b200/"),
    Gpu("a100-40gb", "A100-SXM4-40GB", 40, 312, 1555, 300, f"{_SITE}/a100/"),
    Gpu("a100-40gb-pcie", "A100-PCIE-40GB", 40, 312, 1555, 32, f"{_SITE}/a100/"),
    Gpu("a100-pcie", "A100 80GB PCIe", 80, 312, 1935, 32, f"{_SITE}/a100/"),
    Gpu("a100", "A100", 80, 312, 2039, 300, f"{_SITE}/a100/"),
    Gpu("a800", "A800", 80, 312, 2039, 200, "NVIDIA A800 Tensor Core GPU data sheet"),
    Gpu("l40s", "L40S", 48, 362, 864, 32, f"{_SITE}/l40s/"),
    Gpu("l40", "L40", 48, 181, 864, 32, f"{_SITE}/l40/"),
    Gpu("l4", "NVIDIA L4", 24, 121, 300, 32, f"{_SITE}/l4/"),
    Gpu("a6000", "RTX A6000", 48, 155, 768, 32, "NVIDIA RTX A6000 data sheet"),
    Gpu("rtx4090", "RTX 4090", 24, 165, 1008, 32, _ADA),
    Gpu("rtx3090", "RTX 3090", 24, 71, 936, 32, _AMPERE),
)


def find_gpu(device_name: str) -> Gpu | None:
    """Return the values of a GPU given its device name; None if it is not in the table.

    >>> find_gpu("NVIDIA H100 80GB HBM3").name
    'h100'
    """
    return next((gpu for gpu in GPUS if gpu.device_name in device_name), None)
