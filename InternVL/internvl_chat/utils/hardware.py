"""Processor cores, bf16 instructions and memory that this process may use; cgroup limits are counted."""

import math
import os
from pathlib import Path

_CGROUPS, _OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_CPU_INFO = Path("/proc/cpuinfo")
# Names in /proc/cpuinfo, of x86 and Arm.
_BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "svebf16")


def cpu_cores() -> int:
    """Return the cores that this process may use: its affinity, and the quota of its cgroup."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    for folder in cgroup_folders():
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        if not quota:  # version 1
            quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit():
            cores = min(cores, max(1, math.ceil(int(quota) / int(period))))
    return cores


def cpu_bf16_instructions() -> tuple[str, ...]:
    """Return the bf16 instruction sets of the processor; without one, bf16 products are emulated."""
    flags = {
        word
        for line in _read(_CPU_INFO).splitlines()
        if line.lower().startswith(("flags", "features"))
        for word in line.partition(":")[2].split()
    }
    return tuple(name for name in _BF16_INSTRUCTIONS if name in flags)


def available_host_memory() -> int:
    """Return the host memory in bytes that is still free for this process."""
    import psutil

    free = psutil.virtual_memory().available
    for folder in cgroup_folders():
        for limit, usage, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            most, used = _read(folder / limit), _read(folder / usage)
            if most.isdigit() and used.isdigit():
                stats = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
                # The kernel takes back cached file contents before it refuses memory.
                free = min(free, max(0, int(most) - int(used) + int(stats.get(cache, 0))))
    return free


def cgroup_folders() -> list[Path]:
    """Return the folders that limit this process: those of its cgroups and of their parents."""
    found = []
    for line in _read(_OWN_CGROUPS).splitlines():
        _, controllers, path = line.split(":", 2)
        # In a container the path is often that of the host, and the limits are at the root.
        root = _CGROUPS / controllers
        own = root / path.lstrip("/")
        found += [own, *(parent for parent in own.parents if parent.is_relative_to(root))]
    return [folder for folder in dict.fromkeys(found) if folder.is_dir()]


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
