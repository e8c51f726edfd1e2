"""CPU name and cores, bf16 instruction sets, and host memory for this process, within its cgroup limits."""

import math
import os
import platform
from pathlib import Path

_CGROUPS, _OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_CPU_INFO = Path("/proc/cpuinfo")
# Flags in /proc/cpuinfo on x86 and Arm.
_BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "svebf16")


def cpu_cores() -> int:
    """Return the number of CPU cores that this process may use, given its CPU affinity and cgroup quotas."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    for folder in cgroup_folders():
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        if not quota:  # cgroup v1
            quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit():
            cores = min(cores, max(1, math.ceil(int(quota) / int(period))))
    return cores


def cpu_name() -> str:
    """Return the model name of the CPU, or its architecture if the model is unknown."""
    for line in _read(_CPU_INFO).splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name" and value.strip():
            return value.strip()
    return platform.machine() or "CPU"


def cpu_bf16_instructions() -> tuple[str, ...]:
    """Return the CPU's bf16 instruction sets. Without any, bf16 matrix products are emulated and slow."""
    flags = {
        word
        for line in _read(_CPU_INFO).splitlines()
        if line.lower().startswith(("flags", "features"))
        for word in line.partition(":")[2].split()
    }
    return tuple(name for name in _BF16_INSTRUCTIONS if name in flags)


def available_host_memory() -> int:
    """Return the host memory available to this process, in bytes."""
    import psutil

    free = psutil.virtual_memory().available
    for folder in cgroup_folders():
        for limit, usage, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            total, used = _read(folder / limit), _read(folder / usage)
            if total.isdigit() and used.isdigit():
                stats = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
                # The kernel reclaims the page cache before an allocation fails.
                free = min(free, max(0, int(total) - int(used) + int(stats.get(cache, 0))))
    return free


def cgroup_folders() -> list[Path]:
    """Return the folders of this process's cgroups and their parents."""
    folders = []
    for line in _read(_OWN_CGROUPS).splitlines():
        _, controllers, path = line.split(":", 2)
        # In a container, the path may be relative to the host, while the limits are at the root.
        root = _CGROUPS / controllers
        own = root / path.lstrip("/")
        folders += [own, *(parent for parent in own.parents if parent.is_relative_to(root))]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
