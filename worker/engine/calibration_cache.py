"""Calibrations are kept in the user's cache folder, one file for each model file and machine.

`MESH_CACHE_DIR` names another folder, and `MESH_CALIBRATE=off` does without measurements. A cached
calibration holds until something of its key changes; `mesh worker calibrate --fresh` replaces it.

What was measured while others kept the cores busy lies beside, for engines that are started anew
within minutes: that which has died under load would be measured under load again, for seconds in
which its answers wait.
"""

import hashlib
import os
import platform
import tempfile
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import msgspec
import structlog

from worker import hardware
from worker.engine.calibration import Asked, Calibration

__all__ = ("DISTURBED_SECONDS", "CacheKey", "cache_key", "load", "store", "switched_off")

FORMAT = 2
"""To be raised when a calibration is measured in another way than before."""

DISTURBED_SECONDS = 600.0
"""How long a calibration that was disturbed is of use."""

_CPUINFO = Path("/proc/cpuinfo")

log = structlog.get_logger()


class CacheKey(msgspec.Struct, frozen=True):
    """Everything that a step's cost depends on, as far as it can be named."""

    file: str
    size: int
    modified: int
    """Nanoseconds, as the file system tells them."""
    cpu: str
    host_cores: int
    asked: Asked
    gpu_layers: int
    gpus: tuple[str, ...]
    """Names of those that compute; none if they do not."""
    step_tokens: int
    poll: int
    batch_invariant: bool
    llama: str
    """Version of llama-cpp-python."""
    format: int = FORMAT


class _Record(msgspec.Struct, frozen=True):
    key: CacheKey
    calibration: Calibration


_decoder = msgspec.json.Decoder(_Record)


def switched_off() -> bool:
    """Whether `MESH_CALIBRATE` says off."""
    return os.environ.get("MESH_CALIBRATE", "").strip().lower() in ("off", "0", "no", "false")


def cache_key(
    model: Path,
    asked: Asked,
    *,
    gpu_layers: int,
    step_tokens: int,
    poll: int,
    batch_invariant: bool,
) -> CacheKey:
    """The key of a model file on this machine.

    Raises:
        OSError: there is no such file.
    """
    found = model.stat()
    return CacheKey(
        file=model.name,
        size=found.st_size,
        modified=found.st_mtime_ns,
        cpu=_cpu_name(),
        host_cores=os.cpu_count() or 1,
        asked=asked,
        gpu_layers=gpu_layers,
        gpus=tuple(gpu.name for gpu in hardware.gpus()) if gpu_layers else (),
        step_tokens=step_tokens,
        poll=poll,
        batch_invariant=batch_invariant,
        llama=version("llama-cpp-python"),
    )


def load(key: CacheKey, folder: Path, *, disturbed_within: float = 0.0) -> Calibration | None:
    """What is kept under this key; None if nothing is, or a file that cannot be used.

    Args:
        key: of the model and this machine.
        folder: where calibrations are kept.
        disturbed_within: seconds; one that was disturbed will do, if it is no older.
    """
    kept = _read(key, _path(key, folder))
    if kept is None and disturbed_within:
        path = _path(key, folder, disturbed=True)
        with suppress(OSError):
            if time.time() - path.stat().st_mtime < disturbed_within:
                kept = _read(key, path)
    return kept


def _read(key: CacheKey, path: Path) -> Calibration | None:
    try:
        record = _decoder.decode(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        log.warning("calibration.unreadable", path=str(path), reason=str(error))
        return None
    if record.key != key:  # copied by hand
        log.warning("calibration.unreadable", path=str(path), reason="it is of something else")
        return None
    return record.calibration


def store(
    key: CacheKey, calibration: Calibration, folder: Path, *, disturbed: bool = False
) -> None:
    """Keep a calibration; one that was `disturbed` beside what is kept.

    A folder that cannot be written is told to the log: all goes on without. The file appears
    complete or not at all, whoever else writes it at the same time.
    """
    path = _path(key, folder, disturbed=disturbed)
    data = msgspec.json.format(msgspec.json.encode(_Record(key, calibration)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".partial", delete=False) as partial:
            try:
                partial.write(data)
                partial.close()
                Path(partial.name).replace(path)
            except OSError:
                Path(partial.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        log.warning("calibration.not_kept", path=str(path), reason=error.strerror or str(error))


def _path(key: CacheKey, folder: Path, *, disturbed: bool = False) -> Path:
    name = hashlib.sha256(msgspec.json.encode(key)).hexdigest()[:32]
    return folder / f"{name}{'.disturbed' if disturbed else ''}.json"


def _cpu_name() -> str:
    """The CPU's own name; without one, that of its architecture."""
    with suppress(OSError):
        for line in _CPUINFO.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
