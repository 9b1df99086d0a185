"""llama.cpp's own way to split a model: llama-server with some of the layers behind an RPC server.

Each of the two is pinned to a core and has one thread. The RPC server listens on this host only: it
has no password.
"""

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from loadtests.http_client import Target
from loadtests.peers.asking import ask_all, chat
from loadtests.peers.build_llama_server import built
from loadtests.peers.systems import MODEL, Plan, System, healthy, low_port, server_arguments
from loadtests.stack import StackFailed
from mesh.child import Child

__all__ = ("RPC", "rate_over_rpc", "rpc_halves")

RPC = "RPC"
_STOP_SECONDS = 15.0
_LISTENS_SECONDS = 20.0


@asynccontextmanager
async def rpc_halves(
    model: Path, *, layers: int, slots: int, context: int
) -> AsyncIterator[System]:
    """Start both; they end with the context.

    Args:
        model: the file, which only llama-server reads.
        layers: of the model, that lie behind RPC.
        slots: sequences.
        context: tokens of each.

    Raises:
        BuildFailed: the programs are not built; `make peers` does it.
        StackFailed: one of them did not come up.
    """
    async with AsyncExitStack() as owner:
        folder = Path(owner.enter_context(tempfile.TemporaryDirectory(prefix="mesh-rpc-")))
        port = low_port()
        command = ["taskset", "-c", "1", str(built("ggml-rpc-server"))]
        command += ["--host", "127.0.0.1", "--port", str(port), "--threads", "1"]
        behind = Child("ggml-rpc-server", command, os.environ, folder / "rpc.log")
        owner.push_async_callback(behind.stop, _STOP_SECONDS)
        await behind.start()
        await _listens(port, behind)
        plan = Plan(
            model=model,
            threads=1,
            slots=slots,
            context=context,
            server=built("llama-server"),
            server_extra=("--rpc", f"127.0.0.1:{port}", "--n-gpu-layers", str(layers)),
        )
        at = low_port()
        command = ["taskset", "-c", "0", *server_arguments(plan, "split", at)]
        server = Child(RPC, command, os.environ, folder / "llama-server.log")
        owner.push_async_callback(server.stop, _STOP_SECONDS)
        await server.start()
        await healthy(at, server)
        yield System(RPC, Target(f"http://127.0.0.1:{at}"), MODEL, {"server": server.pid or 0})


async def rate_over_rpc(
    system: System, streams: int, tokens: int, first: int, prompt: Callable[[int], str]
) -> float:
    """Tokens a second of all streams together, each from its first token to its last.

    Raises:
        PartFailed: a request failed.
    """
    requests = [
        chat(system, [{"role": "user", "content": prompt(first + number)}], tokens)
        for number in range(streams)
    ]
    replies = await ask_all(system, requests, streams)
    return sum((reply.tokens - 1) / (reply.ended - reply.first) for reply in replies)


async def _listens(port: int, child: Child) -> None:
    async with asyncio.timeout(_LISTENS_SECONDS):
        while child.pid is not None:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.1)
                continue
            writer.close()
            return
    raise StackFailed(f"{child.name} ended: {child.last_words()}")
