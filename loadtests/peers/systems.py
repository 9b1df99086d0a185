"""The systems that are compared, as processes: ours behind router and NATS, and llama-server.

All get the same model file, threads, slots and context of a slot. They run at the same time and are
asked in turns; the one that is not asked sleeps.
"""

import asyncio
import json
import os
import random
import socket
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Literal

import msgspec

from loadtests.http_client import Target
from loadtests.stack import Stack, StackFailed, get
from mesh.child import Child

__all__ = (
    "OURS",
    "PEERS",
    "Peer",
    "Plan",
    "System",
    "catalog_text",
    "healthy",
    "low_port",
    "running",
    "server_arguments",
    "worker_arguments",
)

Peer = Literal["split", "unified"]
"""How llama-server divides its KV cache: a part for each slot, or one for all."""

OURS = "mesh"
PEERS: dict[Peer, str] = {"split": "llama-server", "unified": "llama-server -kvu"}

MODEL = "bench"
DRAFT = "bench-draft"
DRAFT_TOKENS = 4

_PORTS = range(20_000, 32_000)
_START_SECONDS = 120.0
_STOP_SECONDS = 15.0


class Plan(msgspec.Struct, frozen=True):
    """What every system is given."""

    model: Path
    threads: int
    slots: int
    context: int
    """Tokens of one slot."""
    draft: Path | None = None
    peers: tuple[Peer, ...] = ("split",)
    server: Path = Path("llama-server")
    server_extra: tuple[str, ...] = ()
    worker_extra: tuple[str, ...] = ()


class System(msgspec.Struct, frozen=True):
    """One that answers: its name in tables, where it listens, and its processes by name."""

    name: str
    target: Target
    model: str
    pids: dict[str, int]


def server_arguments(plan: Plan, peer: Peer, port: int) -> list[str]:
    """Return llama-server's command line; its context is that of all slots together."""
    command = [str(plan.server), "--host", "127.0.0.1", "--port", str(port), "--offline", "--no-ui"]
    command += ["--model", str(plan.model), "--threads", str(plan.threads)]
    command += ["--parallel", str(plan.slots), "--ctx-size", str(plan.slots * plan.context)]
    command += ["--kv-unified" if peer == "unified" else "--no-kv-unified"]
    if plan.draft is not None:
        command += ["--model-draft", str(plan.draft), "--spec-type", "draft-simple"]
        command += ["--spec-draft-n-max", str(DRAFT_TOKENS), "--threads-draft", str(plan.threads)]
    return [*command, *plan.server_extra]


def worker_arguments(plan: Plan) -> list[str]:
    """Return what our worker is told beside its folder of models."""
    settings = (f"--slots={plan.slots}", f"--threads={plan.threads}", f"--ctx={plan.context}")
    return [f"--model={MODEL}", *settings, *plan.worker_extra]


def catalog_text(plan: Plan) -> str:
    """Return the models.toml of our worker."""
    lines = [f'[models."{MODEL}"]', f"file = {_toml(str(plan.model.resolve()))}"]
    if plan.draft is not None:
        lines += [f'draft = "{DRAFT}"', "", f'[models."{DRAFT}"]']
        lines += [f"file = {_toml(str(plan.draft.resolve()))}"]
    return "\n".join(lines) + "\n"


def _toml(text: str) -> str:
    # a string of JSON is one of TOML, but for pairs of surrogates, which are not made here
    return json.dumps(text, ensure_ascii=False)


def low_port(ports: Sequence[int] = _PORTS) -> int:
    """Return a port of `ports` that is free, below those the kernel hands out by itself.

    Raises:
        StackFailed: none of 100 tried was free.
    """
    for port in random.sample(ports, min(100, len(ports))):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise StackFailed(f"no free port from {ports[0]} to {ports[-1]}")


async def healthy(port: int, child: Child) -> None:
    """Wait until a llama-server answers.

    Raises:
        StackFailed: it has ended.
        TimeoutError: it does not answer in two minutes.
    """
    async with asyncio.timeout(_START_SECONDS):
        while child.pid is not None:
            try:
                status, _ = await get(port, "/health")
            except (OSError, TimeoutError):
                status = 0
            if status == 200:
                return
            await asyncio.sleep(0.1)
    raise StackFailed(f"{child.name} ended: {child.last_words()}")


async def _start_peer(plan: Plan, peer: Peer, folder: Path, exits: AsyncExitStack) -> System:
    name, port = PEERS[peer], low_port()
    log = folder / f"llama-server-{peer}.log"
    child = Child(name, server_arguments(plan, peer, port), os.environ, log)
    exits.push_async_callback(child.stop, _STOP_SECONDS)
    await child.start()
    try:
        await healthy(port, child)
    except TimeoutError:
        raise StackFailed(
            f"{name} was not ready in {_START_SECONDS:g} s: {child.last_words()}"
        ) from None
    pid = child.pid
    if pid is None:
        raise StackFailed(f"{name} ended: {child.last_words()}")
    return System(name, Target(f"http://127.0.0.1:{port}"), MODEL, {"server": pid})


async def _start_ours(plan: Plan, folder: Path, exits: AsyncExitStack) -> System:
    models = folder / "models"
    models.mkdir()
    (models / "models.toml").write_text(catalog_text(plan), encoding="utf-8")
    stack = await exits.enter_async_context(Stack())
    port = await stack.router("router-1", port=low_port())
    await stack.worker("worker-1", models, *worker_arguments(plan))
    await stack.wait_model("router-1", "worker-1", MODEL, timeout=_START_SECONDS)
    return System(OURS, Target(f"http://127.0.0.1:{port}"), MODEL, stack.pids)


@asynccontextmanager
async def running(plan: Plan) -> AsyncIterator[list[System]]:
    """Start ours and the peers of the plan; all end with the context.

    Raises:
        StackFailed: one of them did not come up; the message holds its last words.
    """
    async with AsyncExitStack() as exits:
        folder = Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="mesh-peers-")))
        ours = await _start_ours(plan, folder, exits)
        yield [ours, *[await _start_peer(plan, peer, folder, exits) for peer in plan.peers]]
