"""A small file system that a test may fill, where it may mount one."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

SIZE = "64m"
# Reads its input to the end, which comes with the test's process however that ends.
_UNMOUNT_AT_THE_END = 'cat >/dev/null; umount --lazy "$1"'
_LONG_ENOUGH_S = 30

__all__ = ("SmallDisk", "small_disk")


class SmallDisk:
    """What is mounted at `folder`."""

    def __init__(self, folder: Path) -> None:
        self._ballast = folder / "ballast"

    def fill(self) -> None:
        """Leave no byte."""
        with self._ballast.open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 9):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(size))

    def free(self) -> None:
        """Give back what `fill` took."""
        self._ballast.unlink()


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[SmallDisk | None]:
    """Mount one; None where that is not allowed: it takes root's rights on Linux.

    It is gone with the test's process, too, where that is killed: left mounted, it would lie in
    the way of a later pytest, which clears old folders away.
    """
    folder.mkdir()
    try:
        mount = ("mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder))
        mounted = os.geteuid() == 0 and not subprocess.run(mount, check=False).returncode
    except FileNotFoundError:
        mounted = False
    if not mounted:
        print("\nno file system may be mounted here: none is filled")
        yield None
        return
    guard = subprocess.Popen(
        ("sh", "-c", _UNMOUNT_AT_THE_END, "sh", str(folder)),
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield SmallDisk(folder)
    finally:
        guard.communicate(timeout=_LONG_ENOUGH_S)
        assert guard.returncode == 0, f"{folder} is still mounted"
