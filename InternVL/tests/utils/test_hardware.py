"""Tests of the limits on CPU cores and memory, and of the detection of bf16 instruction sets."""

import os
from pathlib import Path

import pytest

from internvl_chat.utils import hardware

GB = 10**9


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


@pytest.fixture
def cgroups(monkeypatch, tmp_path):
    """File that lists the cgroups of this process, and root of the cgroup tree."""
    own = tmp_path / "cgroup"
    monkeypatch.setattr(hardware, "_CGROUPS", tmp_path / "sys")
    monkeypatch.setattr(hardware, "_OWN_CGROUPS", own)
    return own, tmp_path / "sys"


def test_limits_of_cgroups_v2(cgroups):
    own, root = cgroups
    own.write_text("0::/outer/inner\n")
    write(root / "outer", cpu__max="150000 100000", memory__max=f"{2 * GB}", memory__current=f"{GB}",
          memory__stat=f"anon 1\ninactive_file {GB // 4}")  # fmt: skip
    write(root / "outer/inner", cpu__max="max 100000", memory__max="max", memory__current="5")
    assert hardware.cpu_cores() == min(2, len(os.sched_getaffinity(0)))
    assert hardware.available_host_memory() == GB + GB // 4


def test_limits_of_cgroups_v1_in_a_container(cgroups):
    """In a container, the path is relative to the host, while the limits are at the root."""
    own, root = cgroups
    own.write_text("5:memory:/docker/0123\n4:cpu:/docker/0123\n")
    write(root / "cpu", cpu__cfs_quota_us="50000", cpu__cfs_period_us="100000")
    write(root / "memory", memory__limit_in_bytes=f"{GB}", memory__usage_in_bytes=f"{GB // 2}")
    assert hardware.cpu_cores() == 1
    assert hardware.available_host_memory() == GB - GB // 2


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("flags\t\t: fpu avx512_bf16 amx_bf16", ("avx512_bf16", "amx_bf16")),
        ("Features\t: fp asimd bf16", ("bf16",)),
        ("flags\t\t: fpu avx2", ()),
    ],
)
def test_bf16_instructions(monkeypatch, tmp_path, line, expected):
    file = tmp_path / "cpuinfo"
    file.write_text(f"processor\t: 0\n{line}\n")
    monkeypatch.setattr(hardware, "_CPU_INFO", file)
    assert hardware.cpu_bf16_instructions() == expected


def test_cpu_name(monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "_CPU_INFO", tmp_path / "cpuinfo")
    assert hardware.cpu_name()
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: AMD EPYC 9R14\nmodel name\t: other\n")
    assert hardware.cpu_name() == "AMD EPYC 9R14"
