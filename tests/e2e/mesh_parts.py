"""The parts, each started alone: nats-server, `mesh-router` and `mesh-worker`, as on many hosts.

For tests that need a worker with settings of its own, or that end it.
"""

import asyncio
import json
import secrets
import signal
import socket
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from mesh_process import clean_environment, mesh_command

from mesh.models import resolve
from shared.broker import Identity, NatsServer

WAIT = 90.0

__all__ = ("MeshParts", "eventually", "running_parts")


def eventually(holds: Callable[[], bool], story: Callable[[], str], every: float = 0.05) -> None:
    """Wait until it holds."""
    deadline = time.monotonic() + WAIT
    while not holds():
        assert time.monotonic() < deadline, story()
        time.sleep(every)


class MeshParts:
    """One router, and one worker with `arguments` that serves the real model as `model`."""

    def __init__(
        self,
        folder: Path,
        nats: NatsServer,
        model: str,
        *arguments: str,
        file: Path | None = None,
    ) -> None:
        """Make it; `file` is the model's, by default the packaged one."""
        self.model = model
        self._folder = folder
        self._nats = nats
        self._arguments = arguments
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        with socket.create_server(("127.0.0.1", 0)) as holder:
            self._port = holder.getsockname()[1]
        self.base_url = f"http://127.0.0.1:{self._port}/v1"
        file = file or resolve((), folder)[0].file
        models = folder / "models"
        models.mkdir()
        (models / "models.toml").write_text(f'[models."{model}"]\nfile = "{file}"\n')

    @property
    def worker(self) -> psutil.Process:
        return psutil.Process(self._processes["mesh-worker"].pid)

    @property
    def engine(self) -> psutil.Process:
        (engine,) = self.worker.children()
        return engine

    def model_state(self) -> dict[str, Any]:
        """What the worker says of its model, as `mesh status` tells it."""
        done = subprocess.run(
            mesh_command("status", "--json"),
            capture_output=True,
            text=True,
            env=clean_environment() | {"MESH_NATS": self._nats.url_for("mesh-1")},
            timeout=60,
            check=True,
        )
        (worker,) = json.loads(done.stdout)["workers"]
        (model,) = worker["models"]
        return dict(model)

    def start_router(self) -> None:
        self._start("mesh-router", "router-1", "--port", str(self._port))

    def start_worker(self) -> None:
        models = str(self._folder / "models")
        self._start("mesh-worker", "worker-1", "--models", models, "--pin-all", *self._arguments)

    def end_worker(self) -> None:
        """End it as an operator does."""
        process = self._processes.pop("mesh-worker")
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT) == 0, self.story()

    def kill_worker(self) -> None:
        """End it and its engine at once, as a host that fails does."""
        process = self._processes.pop("mesh-worker")
        below = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        for child in below:
            child.kill()
        psutil.wait_procs(below, timeout=WAIT)

    def story(self) -> str:
        """All that was said, for the message of a failed test."""
        logs = sorted(self._folder.glob("*.txt"))
        return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in logs)

    def clear_away(self) -> None:
        """Leave nothing behind, whatever has gone wrong."""
        for process in self._processes.values():
            below = psutil.Process(process.pid).children() if process.poll() is None else []
            process.terminate()
            try:
                process.wait(WAIT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for child in psutil.wait_procs(below, timeout=10)[1]:
                child.kill()

    def _start(self, script: str, name: str, *arguments: str) -> None:
        key = f"{script} {name}" if script in self._processes else script
        with (self._folder / f"{key}.txt").open("ab") as log:
            self._processes[key] = subprocess.Popen(
                [str(Path(sysconfig.get_path("scripts")) / script), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=clean_environment() | {"MESH_NATS": self.nats_url(name)},
            )

    def nats_url(self, name: str) -> str:
        """How this part reaches NATS."""
        return self._nats.url_for(name)


@contextmanager
def running_parts(folder: Path, model: str, *arguments: str) -> Iterator[MeshParts]:
    """A nats-server with router and worker started; the worker may still be loading."""
    identities = [
        Identity("router-1", "router", secrets.token_hex(16)),
        Identity("worker-1", "worker", secrets.token_hex(16)),
        Identity("mesh-1", "mesh", secrets.token_hex(16)),
    ]
    server = NatsServer(identities=identities, data_dir=folder / "nats")
    with asyncio.Runner() as runner:
        runner.run(server.__aenter__())
        try:
            parts = MeshParts(folder, server, model, *arguments)
            try:
                parts.start_router()
                parts.start_worker()
                yield parts
            finally:
                parts.clear_away()
        finally:
            runner.run(server.__aexit__(None, None, None))
