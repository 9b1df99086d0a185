"""Routers and workers as processes, each with a user of its own, on a nats-server that may go away.

As on many hosts: each part is started alone, and nobody restarts it but the test.
"""

import asyncio
import contextlib
import secrets
import signal
import socket
import subprocess
import sysconfig
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import httpx
import psutil
from mesh_process import clean_environment

from mesh.fleet import Fleet as Heard
from mesh.models import resolve
from shared import subjects
from shared.broker import Identity, NatsServer
from shared.bus import Bus

WAIT = 90.0
"""Only keeps a broken test from hanging."""
MODEL = "pair"
ROUTERS = ("router-1", "router-2")
WORKERS = ("worker-1", "worker-2")

__all__ = (
    "MODEL",
    "ROUTERS",
    "WAIT",
    "WORKERS",
    "Fleet",
    "fleet_on",
    "free_port",
    "running_fleet",
    "users",
)


class Nats(Protocol):
    """One server or several."""

    @property
    def log_file(self) -> Path: ...

    def url_for(self, name: str, /) -> str: ...


N = TypeVar("N", bound=Nats)


class Fleet(Generic[N]):
    """Two routers, and two workers with the real model; `heard` is what they tell of themselves."""

    # One worker has room for the streams of both: what is measured is not a queue.
    slots = 32

    def __init__(
        self, folder: Path, nats: N, settings: Callable[[str], Mapping[str, str]] = lambda _: {}
    ) -> None:
        """Make it; `settings` are further ones of each part's environment."""
        self.nats = nats
        self._settings = settings
        self.heard = Heard()
        self._folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        # A test kills from a thread of its own while `until` looks for what died by itself.
        self._looking = threading.Lock()
        self._ports = {name: free_port() for name in ROUTERS}
        (file,) = resolve((), folder)
        models = folder / "models"
        models.mkdir()
        (models / "models.toml").write_text(f'[models."{MODEL}"]\nfile = "{file.file}"\n')

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(self.url(name) for name in ROUTERS)

    def url(self, router: str) -> str:
        return f"http://127.0.0.1:{self._ports[router]}/v1"

    def start_router(self, name: str) -> None:
        self._start("mesh-router", name, "", "--port", str(self._ports[name]))

    def start_worker(self, name: str, nats_url: str = "") -> None:
        self._start(
            "mesh-worker",
            name,
            nats_url,
            *("--models", str(self._folder / "models"), "--pin-all", "--threads", "1"),
            *("--slots", str(self.slots), "--ctx", "1024"),
        )

    def process(self, name: str) -> psutil.Process:
        return psutil.Process(self._processes[name].pid)

    def kill(self, name: str) -> None:
        """As when its host loses power."""
        with self._looking:
            process = self._processes.pop(name)
        process.kill()
        process.wait(WAIT)

    async def end(self, name: str) -> int:
        """As an operator does; its exit code."""
        with self._looking:
            process = self._processes.pop(name)
        process.send_signal(signal.SIGTERM)
        try:
            return await asyncio.to_thread(process.wait, WAIT)
        except BaseException:
            process.kill()
            raise

    def busy(self, *workers: str) -> int:
        """Attempts that run or wait on these workers, as they tell."""
        beats = [self.heard.workers[name] for name in workers if name in self.heard.workers]
        return sum(model.busy for beat in beats for model in beat.models)

    async def serves(self) -> bool:
        """Whether each router passes requests on, and knows of both workers."""
        async with httpx.AsyncClient(trust_env=False, timeout=5) as client:
            for name, url in zip(ROUTERS, self.urls, strict=True):
                if name not in self._processes:
                    continue
                try:
                    ready = await client.get(f"{url.removesuffix('/v1')}/readyz")
                    listed = (await client.get(f"{url}/models")).json()["data"]
                except httpx.HTTPError:
                    return False
                workers = [m["meta"]["workers"] for m in listed if m["id"] == MODEL]
                if ready.status_code != 200 or workers != [len(WORKERS)]:
                    return False
        return True

    async def until(self, holds: Callable[[], object], within: float = WAIT) -> float:
        """Wait until it holds; the seconds that it took."""
        began = time.monotonic()
        while True:
            result = holds()
            if await result if asyncio.iscoroutine(result) else result:
                return time.monotonic() - began
            with self._looking:
                ended = [name for name, one in self._processes.items() if one.poll() is not None]
            assert not ended, self.story()
            assert time.monotonic() - began < within, self.story()
            await asyncio.sleep(0.02)

    def story(self) -> str:
        """All that was said, for the message of a failed test."""
        logs = [*sorted(self._folder.glob("*.txt")), self.nats.log_file]
        return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in logs if path.exists())

    def clear_away(self) -> None:
        """Leave nothing behind, whatever has gone wrong."""
        below = []
        for process in self._processes.values():
            if process.poll() is None:
                with contextlib.suppress(psutil.NoSuchProcess):
                    mine = psutil.Process(process.pid)
                    below += mine.children(recursive=True)
                    for one in (mine, *below):
                        one.resume()
                process.send_signal(signal.SIGTERM)
                # A second one ends it at once.
                process.send_signal(signal.SIGTERM)
        for process in self._processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for child in psutil.wait_procs(below, timeout=10)[1]:
            child.kill()

    def _start(self, script: str, name: str, nats_url: str, *arguments: str) -> None:
        with (self._folder / f"{name}.txt").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [str(Path(sysconfig.get_path("scripts")) / script), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=clean_environment()
                | {"MESH_NATS": nats_url or self.nats.url_for(name)}
                | dict(self._settings(name)),
            )


@contextlib.asynccontextmanager
async def running_fleet(
    folder: Path,
    through: Callable[[str, str], str] = lambda _, url: url,
    settings: Callable[[str], Mapping[str, str]] = lambda _: {},
    http_port: int | None = None,
) -> AsyncIterator[Fleet[NatsServer]]:
    """All of it, ready.

    Args:
        folder: for all files.
        through: may give a worker another URL of the server.
        settings: further ones of each part's environment.
        http_port: where NATS tells of itself.
    """
    async with (
        NatsServer(identities=users(), data_dir=folder / "nats", http_port=http_port) as nats,
        fleet_on(nats, folder, through, settings) as fleet,
    ):
        yield fleet


def users() -> list[Identity]:
    """Everybody in a fleet, with new passwords."""
    identities = [Identity(name, "router", secrets.token_hex(16)) for name in ROUTERS]
    identities += [Identity(name, "worker", secrets.token_hex(16)) for name in WORKERS]
    return [*identities, Identity("mesh-1", "mesh", secrets.token_hex(16))]


@contextlib.asynccontextmanager
async def fleet_on(
    nats: N,
    folder: Path,
    through: Callable[[str, str], str] = lambda _, url: url,
    settings: Callable[[str], Mapping[str, str]] = lambda _: {},
) -> AsyncIterator[Fleet[N]]:
    """A fleet on servers that run already."""
    fleet = Fleet(folder, nats, settings)
    try:
        for name in ROUTERS:
            fleet.start_router(name)
        for name in WORKERS:
            fleet.start_worker(name, through(name, nats.url_for(name)))
        async with Bus.connect(nats.url_for("mesh-1"), identity="mesh-1", kind="mesh") as bus:
            await bus.subscribe(subjects.BEATS, lambda m: fleet.heard.hear(m.data))
            await bus.subscribe(subjects.ROUTERS, lambda m: fleet.heard.hear_router(m.data))
            await fleet.until(fleet.serves)
            yield fleet
    finally:
        fleet.clear_away()


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        return int(holder.getsockname()[1])
