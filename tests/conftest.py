"""A real nats-server for the whole run, and connections to it that close themselves."""

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any, Literal

import pytest
import structlog
from hypothesis import HealthCheck, settings

from shared.broker import Identity, NatsServer
from shared.bus import Bus
from tests.serving import serving

Kind = Literal["router", "worker", "mesh"]
_KINDS: tuple[Kind, ...] = ("router", "worker", "mesh")
_numbers = itertools.count(1)
_SYSTEMS = {"e2e", "chaos"}

# Its bounds on time say how busy the machine is, and nothing of the code.
settings.register_profile("mesh", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("mesh")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Tests of whole systems have the machine to themselves; see infra/run_tests.sh, too."""
    folder = item.path.parent.name
    if folder in _SYSTEMS:
        item.add_marker(pytest.mark.alone)
    elif folder != "engine":
        for mark in ("model", "alone"):
            if item.get_closest_marker(mark):
                raise pytest.UsageError(f"{item.nodeid}: what is marked {mark} is in tests/engine")


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """A command's `main` sets up logging for its process, which here is everybody's."""
    before = structlog.get_config()
    yield
    structlog.configure(**before)


@pytest.fixture(scope="session", autouse=True)
def _calibrations_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Engines of the tests calibrate once for all of them, and leave the user's cache alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MESH_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def make_identities() -> Callable[..., list[Identity]]:
    """Make identities `router-1`, `worker-1`, `worker-2`, `mesh-1` …, each with a password."""

    def make(*, routers: int = 2, workers: int = 3, observers: int = 1) -> list[Identity]:
        counts = zip(_KINDS, (routers, workers, observers), strict=True)
        return [
            Identity(f"{kind}-{number}", kind, f"password of {kind}-{number}")
            for kind, count in counts
            for number in range(1, count + 1)
        ]

    return make


@pytest.fixture(scope="session")
def nats_server(
    tmp_path_factory: pytest.TempPathFactory, make_identities: Callable[..., list[Identity]]
) -> Iterator[NatsServer]:
    """One server for all tests that neither stop it nor need users of their own."""
    server = NatsServer(identities=make_identities(), data_dir=tmp_path_factory.mktemp("nats"))
    with serving(server):
        yield server


@pytest.fixture
async def connect(nats_server: NatsServer) -> AsyncIterator[Callable[..., Awaitable[Bus]]]:
    """Connect as an identity of `nats_server`, or of `server=`: `await connect("router-1")`."""
    async with AsyncExitStack() as stack:

        async def connect_as(name: str, *, server: NatsServer = nats_server, **options: Any) -> Bus:
            kind = next(kind for kind in _KINDS if name.startswith(kind))
            bus = Bus.connect(server.url_for(name), identity=name, kind=kind, **options)
            return await stack.enter_async_context(bus)

        yield connect_as


@pytest.fixture
def unique() -> str:
    """A name that no other test uses, not even one of another process on the same server."""
    return f"test-{os.getpid()}-{next(_numbers)}"


@pytest.fixture
def eventually() -> Callable[..., Awaitable[None]]:
    """Wait until a condition holds; the bound only keeps a broken test from hanging."""

    async def wait(condition: Callable[[], bool], timeout: float = 20.0) -> None:
        async with asyncio.timeout(timeout):
            while True:
                if condition():
                    return
                await asyncio.sleep(0.01)

    return wait
