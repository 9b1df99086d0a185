"""One process that `mesh up` has started: its log, its death, its end.

On Linux the kernel kills a child when `mesh up` itself is killed. Each child leads a process group
of its own, so that Ctrl-C in the terminal reaches `mesh up` alone, which then stops them in order.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ("Child",)

_TAIL_BYTES = 16_384

# PR_SET_PDEATHSIG with SIGKILL, then the real program. In the new process rather than by
# preexec_fn, which may deadlock where there are threads.
_TIE = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != int(sys.argv[1]): sys.exit("the process that started this one is gone")
os.execvp(sys.argv[2], sys.argv[2:])
"""


def _tied(command: Sequence[str]) -> list[str]:
    """The command, so changed that the kernel kills it when this process dies, where it can."""
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _TIE, str(os.getpid()), *command]


class Child:
    """A named process whose output goes to a log file of its own."""

    def __init__(
        self, name: str, command: Sequence[str], env: Mapping[str, str], log_path: Path
    ) -> None:
        self.name = name
        self.log_path = log_path
        self._command = tuple(command)
        self._env = dict(env)
        self._process: asyncio.subprocess.Process | None = None
        self._started = 0.0

    @property
    def pid(self) -> int | None:
        """The process's id while it runs."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    @property
    def lived(self) -> float:
        """Seconds since the last start."""
        return time.monotonic() - self._started

    async def start(self) -> None:
        """Start the process; its output is added to the log."""
        self._started = time.monotonic()
        with self.log_path.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *_tied(self._command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._env,
                start_new_session=True,
            )

    async def wait(self) -> int:
        """Wait until the process has ended and return its exit code; -N: killed by signal N."""
        if self._process is None:
            raise RuntimeError(f"{self.name} was never started")
        return await self._process.wait()

    async def stop(self, grace: float) -> None:
        """Ask the process to end, and kill it and its own children if it has not after `grace`."""
        if self._process is None or self.pid is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            async with asyncio.timeout(grace):
                await self._process.wait()
        except TimeoutError:
            self.kill()
            await self._process.wait()

    def kill(self) -> None:
        """Kill the process and what it has started, at once."""
        pid = self.pid
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)

    def last_words(self) -> str:
        """The last line of the log that says something, for a message about the death."""
        try:
            with self.log_path.open("rb") as log:
                log.seek(0, os.SEEK_END)
                log.seek(max(0, log.tell() - _TAIL_BYTES))
                text = log.read().decode(errors="replace")
        except FileNotFoundError:
            return ""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return lines[-1] if lines else ""
