"""What the operator sets, from the bucket through routers to workers, on a real server."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import msgspec
import pytest

import shared.settings
from shared import subjects
from shared.bus import Bus
from shared.kv import MODELS, Kv
from shared.settings import SettingsAnnouncer, SettingsView, encode_settings
from shared.snapshot import ModelSettings

pytestmark = pytest.mark.nats

Connect = Callable[..., Awaitable[Bus]]


@pytest.fixture(autouse=True)
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared.settings, "ANNOUNCE_SECONDS", 0.1)


@pytest.fixture
async def announce() -> AsyncIterator[Callable[[Bus], SettingsAnnouncer]]:
    async with AsyncExitStack() as stack:

        def start(bus: Bus) -> SettingsAnnouncer:
            announcer = SettingsAnnouncer(bus)
            task = asyncio.create_task(announcer.run())

            async def end() -> None:
                task.cancel()
                (result,) = await asyncio.gather(task, return_exceptions=True)
                assert isinstance(result, asyncio.CancelledError), result

            stack.push_async_callback(end)
            return announcer

        yield start


async def put(bus: Bus, model: str, **wanted: Any) -> None:
    data = encode_settings(ModelSettings(model, **wanted))
    await Kv(bus).put(MODELS, subjects.model_key(model), data)


async def test_a_worker_that_comes_late_hears_what_was_set_before(
    own_server: Any, connect: Connect, announce: Any, eventually: Any
) -> None:
    async with own_server() as server:
        mesh, router, worker = [
            await connect(name, server=server) for name in ("mesh-1", "router-1", "worker-1")
        ]
        await Kv(mesh).make(MODELS)
        await put(mesh, "a/b:c", minimum=1, pinned=("worker-1",))
        await put(mesh, "d", maximum=2)
        announcer = announce(router)
        view = SettingsView()
        await view.open(worker)
        await eventually(lambda: view.known)
        assert view.settings == {
            "a/b:c": ModelSettings("a/b:c", minimum=1, pinned=("worker-1",)),
            "d": ModelSettings("d", maximum=2),
        }
        assert announcer.settings == view.settings
        # A change comes from the server itself; what is deleted is set no more.
        await put(mesh, "d", maximum=3)
        await Kv(mesh).delete(MODELS, subjects.model_key("a/b:c"))
        await eventually(lambda: view.settings == {"d": ModelSettings("d", maximum=3)})
        await eventually(lambda: announcer.settings == view.settings)


async def test_the_bucket_is_made_where_it_is_missing(
    own_server: Any, connect: Connect, announce: Any, eventually: Any
) -> None:
    async with own_server() as server:
        router, worker = [await connect(n, server=server) for n in ("router-1", "worker-1")]
        view = SettingsView()
        await view.open(worker)
        announce(router)
        await eventually(lambda: view.known)
        assert view.settings == {}
        assert await Kv(router).read(MODELS) == []


async def test_routers_do_not_all_speak_at_once(
    own_server: Any, connect: Connect, announce: Any, eventually: Any
) -> None:
    async with own_server() as server:
        routers = [await connect(name, server=server) for name in ("router-1", "router-2")]
        worker = await connect("worker-1", server=server)
        told: list[str] = []
        await worker.subscribe(
            subjects.SETTINGS, lambda m: told.append(msgspec.json.decode(m.data)["router"])
        )
        await worker.barrier()
        announce(routers[0])
        await eventually(lambda: len(told) == 20)
        announce(routers[1])
        begun = len(told)
        await asyncio.sleep(3.0)
        # 60 if they did not listen to each other; each keeps silent after the other has spoken.
        assert 3 < len(told) - begun < 45


async def test_settings_are_heard_again_after_a_restart_of_nats(
    own_server: Any, connect: Connect, announce: Any, eventually: Any
) -> None:
    first = own_server()
    view = SettingsView()
    announcers: list[SettingsAnnouncer] = []

    def back(connected: bool) -> None:
        for part in (view, *announcers):
            if connected:
                part.reconnected()

    async with first:
        mesh, router, worker = [
            await connect(name, server=first, on_state=back)
            for name in ("mesh-1", "router-1", "worker-1")
        ]
        await Kv(mesh).make(MODELS)
        await put(mesh, "a", minimum=1)
        announcers.append(announce(router))
        await view.open(worker)
        await eventually(lambda: view.known)
    async with own_server(port=first.port):
        await eventually(lambda: mesh.connected and router.connected and worker.connected)
        await eventually(lambda: view.known)
        await put(mesh, "a", minimum=2)
        await eventually(lambda: view.settings["a"].minimum == 2)
        await eventually(lambda: announcers[0].settings["a"].minimum == 2)
