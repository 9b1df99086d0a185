"""What this process may use of its host: cores, memory, GPUs.

In a container the host's figures are not ours: affinity and cgroup limits count, and of GPUs those
that `CUDA_VISIBLE_DEVICES` names. Nothing here raises because something is absent or broken; a
figure that cannot be had is left out.
"""

import math
import os
from pathlib import Path
from typing import Any

import msgspec
import psutil
import structlog

__all__ = ("Gpu", "Memory", "cores", "gpus", "memory")

_CGROUP = Path("/sys/fs/cgroup")

_log = structlog.get_logger()


class Gpu(msgspec.Struct, frozen=True):
    """One NVIDIA GPU; bytes."""

    index: int
    """As CUDA counts those that it shows."""
    name: str
    total: int
    free: int


class Memory(msgspec.Struct, frozen=True):
    """Bytes of main memory within what this process may use."""

    total: int
    available: int

    @property
    def used(self) -> int:
        """Bytes that cannot be had any more."""
        return max(0, self.total - self.available)


def cores(cgroup: Path = _CGROUP) -> int:
    """Cores this process may keep busy: its affinity, and at most its CPU quota; at least 1."""
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
    else:
        allowed = os.cpu_count() or 1
    quota = _cpu_quota(cgroup)
    return max(1, min(allowed, math.ceil(quota)) if quota else allowed)


def memory(cgroup: Path = _CGROUP) -> Memory:
    """Main memory, within the cgroup's limit if there is one."""
    host = psutil.virtual_memory()
    limit, used = _memory_limit(cgroup)
    if limit is None or limit >= host.total:
        return Memory(host.total, host.available)
    return Memory(limit, max(0, min(limit - (used or 0), host.available)))


def gpus() -> tuple[Gpu, ...]:
    """NVIDIA GPUs as NVML shows them; none if there is no driver, or it does not answer.

    In NVML's order, which is that of the PCI bus: so numbers in `CUDA_VISIBLE_DEVICES` are read,
    too, while CUDA counts the fastest first unless `CUDA_DEVICE_ORDER` says `PCI_BUS_ID`.
    """
    try:
        import pynvml
    except ImportError:
        return ()
    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError, OSError):
        # The usual case on a host without NVIDIA's driver.
        return ()
    found: list[Gpu] = []
    try:
        for index, device in enumerate(_visible(pynvml.nvmlDeviceGetCount())):
            gpu = _gpu(pynvml, index, device)
            if gpu is not None:
                found.append(gpu)
    except pynvml.NVMLError as error:
        _log.warning("nvml.failed", error=str(error))
    finally:
        try:
            pynvml.nvmlShutdown()
        except pynvml.NVMLError as error:
            _log.warning("nvml.failed", error=str(error))
    return tuple(found)


def _visible(count: int) -> list[int | str]:
    """Numbers and UUIDs of the GPUs that CUDA shows to this process, as CUDA reads its variable.

    What follows a number that no GPU has is not seen (CUDA C++ Programming Guide, "CUDA
    Environment Variables").
    """
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is None:
        return list(range(count))
    devices: list[int | str] = []
    for word in map(str.strip, told.split(",")):
        if word.startswith(("GPU-", "MIG-")):
            devices.append(word)
        elif word.isdecimal() and int(word) < count:
            devices.append(int(word))
        else:
            break
    return devices


def _gpu(pynvml: Any, index: int, device: int | str) -> Gpu | None:
    """One GPU; None if just this one is lost (fallen off the bus, or without a memory figure)."""
    try:
        if isinstance(device, int):
            handle = pynvml.nvmlDeviceGetHandleByIndex(device)
        else:
            handle = pynvml.nvmlDeviceGetHandleByUUID(device)
        name = pynvml.nvmlDeviceGetName(handle)
        held = pynvml.nvmlDeviceGetMemoryInfo(handle)
    except pynvml.NVMLError as error:
        _log.warning("gpu.unreadable", gpu=device, error=str(error))
        return None
    text = name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
    return Gpu(index, text, int(held.total), int(held.free))


def _cpu_quota(cgroup: Path) -> float | None:
    """Cores granted by cgroup v2, else v1; None without a limit."""
    words = _read(cgroup / "cpu.max").split()
    if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]):
        return int(words[0]) / int(words[1])
    quota = _number(cgroup / "cpu" / "cpu.cfs_quota_us")
    period = _number(cgroup / "cpu" / "cpu.cfs_period_us")
    return quota / period if quota and period else None


def _memory_limit(cgroup: Path) -> tuple[int | None, int | None]:
    """Limit and use in bytes, cgroup v2 else v1; page cache that can be dropped is not use."""
    limit, used = _number(cgroup / "memory.max"), _number(cgroup / "memory.current")
    stat, key = cgroup / "memory.stat", "inactive_file"
    if limit is None:
        folder = cgroup / "memory"
        limit, used = (
            _number(folder / "memory.limit_in_bytes"),
            _number(folder / "memory.usage_in_bytes"),
        )
        stat, key = folder / "memory.stat", "total_inactive_file"
    if used is not None:
        for line in _read(stat).splitlines():
            name, _, value = line.partition(" ")
            if name == key and value.strip().isdigit():
                used = max(0, used - int(value))
    return limit, used


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
