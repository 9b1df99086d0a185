"""Processes that may have a share of a core and no more, as hosts of the same size have."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ("CpuShare", "NoShares", "cpu_share")

PERIOD = 10_000
"""Microseconds over which a share is counted; short, so that steps are slow rather than halting."""
_CONTROLLERS = (Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup"))
"""Of control groups, version 1 and version 2."""


class NoShares(Exception):
    """The kernel cannot limit processes here, or we may not ask it to."""


class CpuShare:
    """One group of processes; see `cpu_share`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def take(self, pid: int) -> None:
        """Limit a process with all its threads."""
        (self._folder / "cgroup.procs").write_text(str(pid))


@contextlib.contextmanager
def cpu_share(name: str, cores: float) -> Iterator[CpuShare]:
    """Make a group whose processes have so many cores together; it is removed when they are gone.

    Raises:
        NoShares: needs root, and control groups for CPUs.
    """
    parent = next((one for one in _CONTROLLERS if _limits(one)), None)
    if parent is None:
        raise NoShares(f"no control groups for CPUs below {_CONTROLLERS[-1]}")
    folder = parent / f"mesh-{os.getpid()}-{name}"
    quota = round(PERIOD * cores)
    try:
        folder.mkdir()
        if (folder / "cpu.max").exists():
            (folder / "cpu.max").write_text(f"{quota} {PERIOD}")
        else:
            (folder / "cpu.cfs_period_us").write_text(str(PERIOD))
            (folder / "cpu.cfs_quota_us").write_text(str(quota))
    except OSError as error:
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise NoShares(f"cannot limit processes: {error}; root may") from error
    try:
        yield CpuShare(folder)
    finally:
        folder.rmdir()


def _limits(folder: Path) -> bool:
    """Whether groups there can limit CPUs."""
    if (folder / "cpu.cfs_quota_us").exists():
        return True
    controllers = folder / "cgroup.subtree_control"
    return controllers.exists() and "cpu" in controllers.read_text().split()
