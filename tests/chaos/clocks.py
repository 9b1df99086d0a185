"""Clocks of parts that a test may step; see clock/sitecustomize.py."""

import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

__all__ = ("Clocks",)


class Clocks:
    """One for each part, all right at first."""

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self._folder = folder
        folder.mkdir()
        for name in names:
            self.step(name, 0.0)

    def step(self, name: str, ahead: float) -> None:
        """From now on this part is so many seconds ahead, in all its processes at once."""
        file = self._folder / name
        # In place: the part has it mapped.
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.pwrite(descriptor, struct.pack("d", ahead), 0)
        finally:
            os.close(descriptor)

    def settings(self, name: str) -> Mapping[str, str]:
        """The environment that gives the part its clock."""
        shim = Path(__file__).parent / "clock"
        return {"PYTHONPATH": str(shim), "MESH_TEST_CLOCK": str(self._folder / name)}
