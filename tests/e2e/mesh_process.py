"""`mesh up` as a process: started in a folder of its own, watched, ended, cleared away."""

import contextlib
import os
import signal
import subprocess
import sysconfig
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from mesh.models import DEFAULT_MODEL
from mesh.running import Running, find

READY_WITHIN = 300.0
ENDED_WITHIN = 90.0

__all__ = ("MeshUp", "clean_environment", "mesh_command")


def mesh_command(*arguments: str) -> list[str]:
    return [str(Path(sysconfig.get_path("scripts")) / "mesh"), *arguments]


def clean_environment() -> dict[str, str]:
    """Ours without settings of a mesh; what a child says is not held back in buffers."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MESH_")}
    return kept | {"PYTHONUNBUFFERED": "1"}


class MeshUp:
    """A `mesh up` in a folder of its own."""

    model = DEFAULT_MODEL

    def __init__(
        self, folder: Path, *arguments: str, settings: Mapping[str, str] | None = None
    ) -> None:
        """Start it; `settings` are for its parts, as `MESH_MEMORY`."""
        self.data_dir = folder / "data"
        self.output = folder / "out.txt"
        self.errors = folder / "err.txt"
        with self.output.open("wb") as out, self.errors.open("wb") as err:
            self.process = subprocess.Popen(
                mesh_command("up", "--port", "0", "--data-dir", str(self.data_dir), *arguments),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=clean_environment() | dict(settings or {}),
                start_new_session=True,
            )
        self._seen: dict[int, psutil.Process] = {}

    @property
    def text(self) -> str:
        return self.output.read_text()

    @property
    def running(self) -> Running:
        return find(self.data_dir)

    @property
    def base_url(self) -> str:
        return self.running.url

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by name: `router-1`, `worker-1`, `engine of worker-1`, `nats`, `up`."""
        found = {"up": self.process.pid}
        for child in self.children():
            # A process may end while it is looked at; a zombie has no command line.
            with contextlib.suppress(psutil.NoSuchProcess):
                words = child.cmdline()
                if words and "nats-server" in words[0]:
                    found["nats"] = child.pid
                elif "--name" in words:
                    name = words[words.index("--name") + 1]
                    found[name] = child.pid
                    for engine in child.children():
                        if "worker.engine" in engine.cmdline():
                            found[f"engine of {name}"] = engine.pid
        return found

    def children(self) -> list[psutil.Process]:
        """All processes below `mesh up`; those once seen are remembered for `left`."""
        now = psutil.Process(self.process.pid).children(recursive=True)
        self._seen |= {child.pid: child for child in now}
        return now

    def left(self) -> list[psutil.Process]:
        """Processes of this system that still run."""
        return [child for child in self._seen.values() if _runs(child)]

    def until_ready(self) -> "MeshUp":
        deadline = time.monotonic() + READY_WITHIN
        while "Ctrl-C stops everything" not in self.text:
            assert self.process.poll() is None, self.story()
            assert time.monotonic() < deadline, self.story()
            self.children()
            time.sleep(0.05)
        return self

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal, wait for the end and return the exit code."""
        if self.process.poll() is None:
            self.children()
            self.process.send_signal(number)
        code = self.process.wait(ENDED_WITHIN)
        psutil.wait_procs(list(self._seen.values()), timeout=10)
        return code

    def clear_away(self) -> None:
        """Leave nothing behind, whatever has gone wrong."""
        if self.process.poll() is None:
            self.children()
            self.process.kill()
            self.process.wait()
        for child in self.left():
            child.kill()

    def story(self) -> str:
        """All that was said, for the message of a failed test."""
        logs = sorted((self.data_dir / "logs").glob("*.log"))
        parts = [self.output, self.errors, *logs]
        return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in parts)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
