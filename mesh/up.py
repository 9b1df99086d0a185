"""`mesh up`: a whole system on this host, from the first process to the last.

Order of a start: NATS, then routers and workers together. Order of a stop: routers, which finish
their answers, then workers, then NATS. Whatever ends it, nothing is left running.
"""

import asyncio
import errno
import os
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from mesh.child import Child
from mesh.crew import Crew
from mesh.errors import CommandError
from mesh.fleet import Fleet
from mesh.models import ModelFile, models_toml, resolve
from mesh.narrator import Narrator
from mesh.parts import (
    COMMANDS,
    UP,
    UpSettings,
    base_url,
    child_environment,
    identities,
    router_command,
    threads_for,
    worker_command,
)
from mesh.readiness import wait_for_models, wait_for_routers
from mesh.running import Running, claim, publish
from shared import subjects
from shared.broker import NatsServer
from shared.bus import Bus, BusUnavailable
from shared.command_line import CommandFailed, identity

__all__ = ("Up", "bring_up", "check_ports")

_DRAIN = 35.0
"""Seconds that routers have for open answers; a little more than they give themselves."""
_WORKER_END = 35.0


class _Plan(msgspec.Struct, frozen=True):
    ports: tuple[int, ...]
    routers: tuple[str, ...]
    workers: tuple[str, ...]
    models: tuple[ModelFile, ...]
    folder: Path
    """Holds the generated `models.toml`."""
    logs: Path

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(base_url(port) for port in self.ports)

    @property
    def model_names(self) -> tuple[str, ...]:
        return tuple(model.name for model in self.models)


class Up:
    """One run of `mesh up`."""

    def __init__(self, settings: UpSettings, narrator: Narrator) -> None:
        self._settings = settings
        self._say = narrator
        self._crew = Crew(narrator.warn)
        self._fleet = Fleet()
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Bring the system up and keep it until a signal comes.

        Raises:
            CommandError: it cannot be brought up; all that was started has been stopped.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        try:
            with claim(self._settings.data_dir):
                plan = self._plan()
                async with asyncio.TaskGroup() as group, self._broker(group, plan) as urls:
                    await self._run_parts(group, plan, urls)
        except BaseExceptionGroup as errors:
            expected, others = errors.split((CommandFailed, BusUnavailable))
            if others is not None or expected is None:
                raise
            raise CommandError(str(_first(expected))) from None
        finally:
            self._say.quiet()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._say.warn("killing what is left")
            self._crew.kill()
        self._stop.set()

    def _plan(self) -> _Plan:
        settings = self._settings
        folder = settings.data_dir / "models"
        logs = settings.data_dir / "logs"
        folder.mkdir(exist_ok=True)
        logs.mkdir(exist_ok=True)
        models = resolve(settings.models, folder)
        ports = check_ports(settings.port, settings.routers)
        served = settings.data_dir / "served"
        served.mkdir(exist_ok=True)
        (served / "models.toml").write_text(models_toml(models), encoding="utf-8")
        # Others may use the same external NATS under the plain names.
        mark = f"-{os.urandom(3).hex()}" if settings.nats else ""
        return _Plan(
            ports=ports,
            routers=tuple(f"router-{n}{mark}" for n in range(1, settings.routers + 1)),
            workers=tuple(f"worker-{n}{mark}" for n in range(1, settings.workers + 1)),
            models=models,
            folder=served,
            logs=logs,
        )

    @asynccontextmanager
    async def _broker(self, group: asyncio.TaskGroup, plan: _Plan) -> AsyncIterator["_Urls"]:
        settings = self._settings
        if settings.nats:
            yield _Urls(dict.fromkeys((*plan.routers, *plan.workers, UP, COMMANDS), settings.nats))
            return
        users = identities(settings.routers, settings.workers, commands=2)
        server = NatsServer(identities=users, data_dir=settings.data_dir / "nats")
        started = asyncio.Event()
        group.create_task(self._crew.keep_broker(server, started))
        try:
            await self._crew.unless_failed(started.wait())
            self._say.step(f"NATS runs at {server.host}:{server.port}, one user for each process")
            yield _Urls({user.name: server.url_for(user.name) for user in users})
        finally:
            self._crew.release_broker()

    async def _run_parts(self, group: asyncio.TaskGroup, plan: _Plan, urls: "_Urls") -> None:
        url = urls.of[UP]
        async with Bus.connect(url, identity=identity("mesh", url), kind="mesh") as bus:
            if self._settings.nats:
                self._say.step("NATS answers")
            await bus.subscribe(subjects.BEATS, lambda message: self._fleet.hear(message.data))
            await bus.barrier()
            try:
                self._start_parts(group, plan, urls)
                await self._crew.unless_failed(self._until_stopped(plan, urls))
                self._say.quiet()
                self._say.step("stopping; once more Ctrl-C to kill")
            finally:
                await self._crew.stop("routers", _DRAIN)
                await self._crew.stop("workers", _WORKER_END)

    async def _until_stopped(self, plan: _Plan, urls: "_Urls") -> None:
        start = asyncio.create_task(self._come_up(plan, urls))
        stop = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({start, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not stop.done():
                start.result()
                await stop
        finally:
            start.cancel()
            stop.cancel()
            await asyncio.gather(start, stop, return_exceptions=True)

    def _start_parts(self, group: asyncio.TaskGroup, plan: _Plan, urls: "_Urls") -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        settings = self._settings
        parts = [
            ("routers", name, router_command(name, port, settings))
            for name, port in zip(plan.routers, plan.ports, strict=True)
        ]
        parts += [
            ("workers", name, worker_command(name, plan.folder, settings, cores or 1))
            for name in plan.workers
        ]
        for kind, name, command in parts:
            log = plan.logs / f"{name}.log"
            log.unlink(missing_ok=True)
            child = Child(name, command, child_environment(urls.of[name]), log)
            group.create_task(self._crew.keep(kind, child))
        threads = settings.threads or threads_for(settings.workers, cores or 1)
        self._say.step(
            f"starting {_count(len(plan.routers), 'router')} and "
            f"{_count(len(plan.workers), 'worker')}, {_count(threads, 'thread')} each"
        )

    async def _come_up(self, plan: _Plan, urls: "_Urls") -> None:
        loads = await wait_for_models(
            self._fleet, plan.workers, plan.model_names, self._say.loading
        )
        for worker, model, reason in loads.failed:
            self._say.warn(f"{worker} cannot serve {model}: {reason}")
        await wait_for_routers(plan.urls, loads.served)
        self._crew.settle()
        running = Running(
            pid=os.getpid(),
            started=time.time(),
            url=plan.urls[0],
            nats=urls.of[COMMANDS],
            models=loads.served,
        )
        publish(self._settings.data_dir, running)
        self._say.ready(plan.urls, loads.served, plan.logs)


async def bring_up(settings: UpSettings, narrator: Narrator) -> None:
    """Run `mesh up` until a signal comes; raises as `Up.run`."""
    await Up(settings, narrator).run()


class _Urls(msgspec.Struct, frozen=True, repr_omit_defaults=True):
    of: dict[str, str]
    """Secrets: NATS URLs by identity."""


def check_ports(first: int, count: int) -> tuple[int, ...]:
    """The routers' ports, each found free; 0 asks for any free ones.

    Raises:
        CommandError: one is taken, or there is no such port.
    """
    if first == 0:
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
        ports = tuple(int(sock.getsockname()[1]) for sock in sockets)
        for sock in sockets:
            sock.close()
        return ports
    if not 0 < first <= 65_536 - count:
        raise CommandError(f"--port {first}: wanted 1 to {65_536 - count}, or 0 for any free one")
    for port in range(first, first + count):
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError as error:
            reason = "is taken" if error.errno == errno.EADDRINUSE else f"is not free: {error}"
            raise CommandError(f"port {port} {reason}; choose another with --port") from error
    return tuple(range(first, first + count))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    first = errors.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
