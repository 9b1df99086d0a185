"""Routers in this process, on real sockets and a real broker, with scripted workers."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import httpx
import openai
import pytest
from scripted_worker import WAIT, Script, ScriptedWorker, hello

from router.server import Serving, serving
from router.settings import Settings
from shared.broker import NatsServer
from shared.bus import Bus

pytestmark = pytest.mark.nats


@pytest.fixture
def started() -> list[tuple[NatsServer, Serving]]:
    """The routers of this test, and their brokers."""
    return []


@pytest.fixture
async def start_router(
    nats_server: NatsServer, started: list[tuple[NatsServer, Serving]]
) -> AsyncIterator[Callable[..., Any]]:
    """Start a router: `await start_router(ping_interval=0.3)`."""
    async with AsyncExitStack() as stack:

        async def start(
            name: str = "router-1", server: NatsServer = nats_server, **settings: Any
        ) -> Serving:
            chosen = {"nats": server.url_for(name), "name": name, "port": 0, "grace": 1.0}
            router = await stack.enter_async_context(serving(Settings(**(chosen | settings))))
            started.append((server, router))
            return router

        yield start


@pytest.fixture
async def router(start_router: Callable[..., Awaitable[Serving]]) -> Serving:
    """A router with the default settings."""
    return await start_router()


@pytest.fixture
async def start_worker(
    connect: Callable[..., Awaitable[Bus]],
    unique: str,
    nats_server: NatsServer,
    started: list[tuple[NatsServer, Serving]],
    eventually: Callable[..., Awaitable[None]],
) -> AsyncIterator[Callable[..., Any]]:
    """Start a scripted worker: `await start_worker(script, name="worker-2")`.

    It is there once the routers have measured how far it is: until then they leave it for any that
    they have.
    """
    async with AsyncExitStack() as stack:

        async def start(
            script: Script = hello,
            *,
            name: str = "worker-1",
            model: str = unique,
            server: NatsServer | None = None,
            **state: Any,
        ) -> ScriptedWorker:
            broker = nats_server if server is None else server
            bus = await connect(name, server=broker)
            worker = await stack.enter_async_context(ScriptedWorker(bus, model, script, **state))
            for its_broker, router in started:
                if its_broker is broker:
                    distances = router.dispatcher.distances
                    await eventually(lambda seen=distances: seen.rtt(name) is not None)
            return worker

        yield start


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    """A plain HTTP client."""
    async with httpx.AsyncClient(timeout=WAIT, trust_env=False) as client:
        yield client


@pytest.fixture
async def sdk(router: Serving) -> AsyncIterator[openai.AsyncOpenAI]:
    """The official client, pointed at `router`."""
    async with httpx.AsyncClient(trust_env=False) as inner:
        client = openai.AsyncOpenAI(
            base_url=f"{router.url}/v1",
            api_key="none",
            max_retries=0,
            timeout=WAIT,
            http_client=inner,
        )
        yield client


@pytest.fixture
def chat(unique: str) -> Callable[..., dict[str, Any]]:
    """Make the body of a chat request for the test's own model."""

    def make(text: str = "hi", **more: Any) -> dict[str, Any]:
        return {"model": unique, "messages": [{"role": "user", "content": text}]} | more

    return make
