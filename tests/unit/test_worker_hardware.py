"""Cores, memory and GPUs, with and without limits; nothing that is absent may break."""

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import psutil
import pytest

from worker import hardware


def put(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_cores_without_a_quota_are_the_affinity(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    assert hardware.cores(tmp_path) == 6
    assert hardware.cores(put(tmp_path, cpu_DOT_max="max 100000\n")) == 6


@pytest.mark.parametrize(
    ("quota", "cores"), [("250000 100000", 3), ("50000 100000", 1), ("900000 100000", 6)]
)
def test_a_quota_limits_cores(tmp_path: Path, monkeypatch, quota: str, cores: int):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    assert hardware.cores(put(tmp_path, cpu_DOT_max=quota)) == cores


def test_an_old_cgroup_s_quota_counts_too(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    folder = tmp_path / "cpu"
    folder.mkdir()
    (folder / "cpu.cfs_quota_us").write_text("200000")
    (folder / "cpu.cfs_period_us").write_text("100000")
    assert hardware.cores(tmp_path) == 2
    (folder / "cpu.cfs_quota_us").write_text("-1")
    assert hardware.cores(tmp_path) == 6


def test_memory_without_a_limit_is_the_host_s(tmp_path: Path):
    assert hardware.memory(tmp_path).total == psutil.virtual_memory().total


def test_a_cgroup_limits_memory_and_dropped_cache_is_free(tmp_path: Path):
    put(
        tmp_path,
        memory_DOT_max="100000000\n",
        memory_DOT_current="60000000\n",
        memory_DOT_stat="anon 1\ninactive_file 50000000\n",
    )
    memory = hardware.memory(tmp_path)
    assert memory.total == 100_000_000
    assert memory.available == 90_000_000
    assert memory.used == 10_000_000


def test_an_old_cgroup_limits_memory_too(tmp_path: Path):
    folder = tmp_path / "memory"
    folder.mkdir()
    (folder / "memory.limit_in_bytes").write_text("100000000")
    (folder / "memory.usage_in_bytes").write_text("30000000")
    (folder / "memory.stat").write_text("total_inactive_file 10000000\n")
    assert hardware.memory(tmp_path) == hardware.Memory(100_000_000, 80_000_000)


def test_a_limit_beyond_the_host_is_none(tmp_path: Path):
    put(tmp_path, memory_DOT_max=str(2**62), memory_DOT_current="1")
    assert hardware.memory(tmp_path).total == psutil.virtual_memory().total


class NVMLError(Exception):
    pass


def fake_nvml(monkeypatch, **changes: object) -> list[str]:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    calls: list[str] = []
    module = ModuleType("pynvml")
    functions: dict[str, object] = {
        "NVMLError": NVMLError,
        "nvmlInit": lambda: calls.append("init"),
        "nvmlShutdown": lambda: calls.append("shutdown"),
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetHandleByUUID": lambda uuid: {"GPU-a": 0, "GPU-b": 1}[uuid],
        "nvmlDeviceGetName": lambda handle: f"GPU {handle}",
        "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(total=100 + handle, free=50),
    }
    for name, value in (functions | changes).items():
        setattr(module, name, value)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return calls


def fails(*_: object) -> None:
    raise NVMLError("Driver not loaded")


def test_gpus_are_listed(monkeypatch):
    calls = fake_nvml(monkeypatch)
    assert hardware.gpus() == (
        hardware.Gpu(0, "GPU 0", 100, 50),
        hardware.Gpu(1, "GPU 1", 101, 50),
    )
    assert calls == ["init", "shutdown"]


@pytest.mark.parametrize(
    ("told", "names"),
    [
        ("0,1", ["GPU 0", "GPU 1"]),
        ("1, 0", ["GPU 1", "GPU 0"]),
        ("1", ["GPU 1"]),
        ("GPU-b", ["GPU 1"]),
        ("1,2,0", ["GPU 1"]),
        ("-1,0", []),
        ("NoDevFiles", []),
        ("", []),
    ],
)
def test_gpus_that_cuda_does_not_show_are_none(monkeypatch, told, names):
    fake_nvml(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", told)
    found = hardware.gpus()
    assert [gpu.name for gpu in found] == names
    assert [gpu.index for gpu in found] == list(range(len(names)))


def test_names_may_be_bytes(monkeypatch):
    fake_nvml(monkeypatch, nvmlDeviceGetName=lambda _: b"H100", nvmlDeviceGetCount=lambda: 1)
    assert hardware.gpus()[0].name == "H100"


def test_no_package_no_gpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert hardware.gpus() == ()


def test_no_driver_no_gpu(monkeypatch):
    calls = fake_nvml(monkeypatch, nvmlInit=fails)
    assert hardware.gpus() == ()
    assert calls == []


def test_a_failing_count_is_no_gpu_and_nvml_is_closed(monkeypatch):
    calls = fake_nvml(monkeypatch, nvmlDeviceGetCount=fails)
    assert hardware.gpus() == ()
    assert calls == ["init", "shutdown"]


def test_a_lost_gpu_does_not_hide_the_others(monkeypatch):
    def memory(handle: int) -> SimpleNamespace:
        if handle == 0:
            raise NVMLError("GPU is lost")
        return SimpleNamespace(total=7, free=3)

    fake_nvml(monkeypatch, nvmlDeviceGetMemoryInfo=memory)
    assert hardware.gpus() == (hardware.Gpu(1, "GPU 1", 7, 3),)


def test_a_failing_shutdown_changes_nothing(monkeypatch):
    fake_nvml(monkeypatch, nvmlShutdown=fails)
    assert len(hardware.gpus()) == 2


def test_this_machine_s_figures_are_sane():
    memory = hardware.memory()
    assert 0 < memory.available <= memory.total
    assert hardware.cores() >= 1
    assert isinstance(hardware.gpus(), tuple)
