"""Standbys with real engine processes (that play one): roles taken up, kept, and let go."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import msgspec
import pytest
from router_side import RouterSide

from shared import subjects
from shared.broker import Identity, NatsServer
from shared.bus import Bus
from shared.demand import encode_entry
from shared.kv import DEMAND, MODELS, ROLES, Kv
from shared.leases import Lease
from shared.presence import Beat, RoleChange
from shared.protocol import Busy, End
from shared.replicas import Timing
from shared.settings import SettingsAnnouncer, encode_settings
from shared.snapshot import ModelSettings
from worker.outlook import Outlook

pytestmark = pytest.mark.nats

BRISK = Timing(idle_after=1.0, evict_after=0.3, least_stay=0.3, settle=0.3)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decide as soon as the settings are known."""
    monkeypatch.setattr(Outlook, "complete", property(lambda outlook: outlook.settings.known))


class Side(RouterSide):
    def holder(self, model: str, number: int = 0) -> str:
        entry = self.leases.get(subjects.lease_key(model, number))
        return "" if entry is None or entry.value is None else _lease(entry.value).worker


def _lease(data: bytes) -> Lease:
    return msgspec.json.decode(data, type=Lease)


@pytest.fixture
async def side(router: Any) -> AsyncIterator[Side]:
    side = Side(router.bus)
    async with side.running():
        yield side


@pytest.fixture
async def mesh(connect: Callable[..., Awaitable[Bus]]) -> AsyncIterator[Callable[..., Any]]:
    kv = Kv(await connect("mesh-1"))
    async with AsyncExitStack() as stack:

        async def set_model(model: str, **wanted: Any) -> None:
            settings = ModelSettings(model, **wanted)
            key = subjects.model_key(model)
            await kv.put(MODELS, key, encode_settings(settings))
            stack.push_async_callback(kv.delete, MODELS, key)

        yield set_model


def names(beat: Beat, state: str = "ready") -> set[str]:
    return {model.name for model in beat.models if model.state == state}


def changed(beat: Beat, action: str, model: str) -> list[RoleChange]:
    return [c for c in beat.changes if (c.action, c.model) == (action, model)]


async def test_a_standby_takes_up_what_is_asked_for_and_lets_it_go_without_use(
    start, router, side: Side, unique: str
):
    a, b = f"{unique}-a", f"{unique}-b"
    await start(a, b, standby=True, timing=BRISK)
    beat = await router.beat("worker-1", lambda beat: bool(beat.able))
    assert (beat.state, beat.models) == ("standby", ())
    assert [model.name for model in beat.able] == [a, b]
    side.ledger.waits(a, time.time())
    beat = await router.beat("worker-1", lambda beat: names(beat) == {a})
    (change,) = changed(beat, "promote", a)
    assert "1 waiting" in change.reason
    assert side.holder(a) == "worker-1"
    side.ledger.waits_no_more(a, time.time())
    assert isinstance(await (await router.ask("tokens=2", model=a)).last(), End)
    used = time.time()
    beat = await router.beat("worker-1", lambda beat: not beat.models)
    assert beat.state == "standby"
    (change,) = changed(beat, "demote", a)
    assert "idle" in change.reason
    assert change.at >= used + BRISK.idle_after - 0.5
    await router.nobody(a)
    async with asyncio.timeout(20):
        while side.holder(a):  # noqa: ASYNC110 - no event tells it
            await asyncio.sleep(0.05)


async def test_nothing_is_loaded_for_what_nobody_waits_for(start, router, side: Side, unique: str):
    await start(unique, standby=True, timing=BRISK)
    await router.beat("worker-1", lambda beat: bool(beat.able))
    # Counted, answered elsewhere, or a name that nobody could load.
    side.ledger.requested(unique, time.time())
    side.ledger.waits(f"{unique}-unknown", time.time(), known=False)
    seen = len(router.beats)
    await asyncio.sleep(3.0)
    assert all(not beat.models for beat in router.beats[seen:] if beat.worker == "worker-1")


async def test_a_minimum_is_kept_without_demand(
    start, router, side: Side, mesh: Callable[..., Any], unique: str
):
    await mesh(unique, minimum=1)
    await start(unique, standby=True, timing=BRISK)
    await router.beat("worker-1", lambda beat: names(beat) == {unique})
    seen = len(router.beats)
    await asyncio.sleep(BRISK.idle_after + 2.0)
    assert all(beat.models for beat in router.beats[seen:] if beat.worker == "worker-1")


async def test_a_replica_of_two_is_where_it_was_not_yet(
    start, router, side: Side, mesh: Callable[..., Any], unique: str
):
    await mesh(unique, minimum=2)
    for name in ("worker-1", "worker-2"):
        await start(unique, name=name, standby=True, timing=BRISK)
    for name in ("worker-1", "worker-2"):
        await router.beat(name, lambda beat: names(beat) == {unique})
    assert {side.holder(unique, number) for number in (0, 1)} == {"worker-1", "worker-2"}


async def test_demand_shifts_and_the_idle_model_makes_room(start, router, side: Side, unique: str):
    a, b = f"{unique}-a", f"{unique}-b"
    probe = await start(a, b, name="worker-2", standby=True)
    cost = max(
        model.memory for model in (await router.beat("worker-2", lambda beat: bool(beat.able))).able
    )
    probe.agent.stop()
    await probe.task
    await start(a, b, standby=True, memory=cost, timing=BRISK._replace(idle_after=3600.0))
    side.ledger.waits(a, time.time())
    await router.beat("worker-1", lambda beat: names(beat) == {a})
    side.ledger.waits_no_more(a, time.time())
    assert isinstance(await (await router.ask("tokens=2", model=a)).last(), End)
    side.ledger.waits(b, time.time())
    beat = await router.beat("worker-1", lambda beat: names(beat) == {b})
    (change,) = changed(beat, "demote", a)
    assert b in change.reason
    side.ledger.waits_no_more(b, time.time())
    assert isinstance(await (await router.ask("tokens=2", model=b)).last(), End)


async def test_a_lost_role_is_drained_and_drops_no_stream(
    start, router, side: Side, unique: str, connect: Callable[..., Awaitable[Bus]]
):
    await start(unique, standby=True, timing=BRISK)
    side.ledger.waits(unique, time.time())
    await router.beat("worker-1", lambda beat: names(beat) == {unique})
    stream = await router.ask("tokens=40 every=0.05", model=unique)
    await stream.until(lambda asked: len(asked.frames) > 2)
    other = Kv(await connect("worker-2"))
    now = time.time()
    lease = Lease("worker-2", now, now, "ready")
    await other.tell(ROLES, subjects.lease_key(unique, 0), msgspec.json.encode(lease))
    beat = await router.beat("worker-1", lambda beat: names(beat, "draining") == {unique})
    (change,) = changed(beat, "lost", unique)
    assert "worker-2" in change.reason
    late = await router.ask("tokens=1", model=unique, worker="worker-1")
    busy = await late.first()
    assert isinstance(busy, Busy)
    assert busy.reason == "draining"
    assert isinstance(await stream.last(), End)
    assert [frame.first for frame in stream.frames if hasattr(frame, "first")] == list(range(40))
    await router.beat("worker-1", lambda beat: not beat.models)


async def test_a_role_that_cannot_be_served_is_given_up_and_not_offered_again(
    start, router, side: Side, unique: str
):
    bad = f"refuse-{unique}"
    await start(bad, unique, standby=True, timing=BRISK)
    side.ledger.waits(bad, time.time())
    beat = await router.beat("worker-1", lambda beat: bool(changed(beat, "fail", bad)))
    assert "does not like this model" in changed(beat, "fail", bad)[0].reason
    beat = await router.beat("worker-1", lambda beat: not beat.models)
    assert [model.name for model in beat.able] == [unique]
    async with asyncio.timeout(20):
        while side.holder(bad):  # noqa: ASYNC110 - no event tells it
            await asyncio.sleep(0.05)
    # The others are as good as before.
    side.ledger.waits(unique, time.time())
    await router.beat("worker-1", lambda beat: names(beat) == {unique})


async def test_a_pinned_model_stays_and_gets_a_lease(start, router, side: Side, unique: str):
    await start(unique, timing=BRISK)
    async with asyncio.timeout(20):
        while side.holder(unique) != "worker-1":  # noqa: ASYNC110 - no event tells it
            await asyncio.sleep(0.05)
    seen = len(router.beats)
    await asyncio.sleep(BRISK.idle_after + 1.5)
    own = [beat for beat in router.beats[seen:] if beat.worker == "worker-1"]
    assert own
    assert all(names(beat) == {unique} for beat in own)
    assert all(beat.changes == () for beat in own)


async def test_a_standby_that_ends_gives_its_leases_back(start, router, side: Side, unique: str):
    running = await start(unique, standby=True, timing=BRISK)
    side.ledger.waits(unique, time.time())
    await router.beat("worker-1", lambda beat: names(beat) == {unique})
    assert side.holder(unique) == "worker-1"
    running.agent.stop()
    await running.task
    async with asyncio.timeout(20):
        while side.holder(unique):  # noqa: ASYNC110 - no event tells it
            await asyncio.sleep(0.05)


async def test_a_role_outlives_a_restart_of_nats(
    start, router, tmp_path: Any, make_identities: Callable[..., list[Identity]], connect, unique
):
    server = NatsServer(identities=make_identities(), data_dir=tmp_path / "own")
    async with AsyncExitStack() as stack:
        async with server:
            bus = await connect("router-2", server=server)
            other = type(router)(bus)
            await other.open()
            side = Side(bus)
            await side.open()
            announcer = asyncio.create_task(SettingsAnnouncer(bus).run())
            stack.callback(announcer.cancel)
            running = await start(
                unique,
                url=server.url_for("worker-1"),
                standby=True,
                timing=BRISK._replace(idle_after=3600.0),
            )
            await other.beat("worker-1", lambda beat: bool(beat.able))
            side.ledger.waits(unique, time.time())
            for entry in side.ledger.due(time.time()):
                key = subjects.demand_key(entry.model, entry.router)
                await side.kv.put(DEMAND, key, encode_entry(entry))
            await other.beat("worker-1", lambda beat: names(beat) == {unique})
            pid = await running.engine_pid(unique)
        again = NatsServer(
            identities=make_identities(), data_dir=tmp_path / "own", port=server.port
        )
        await asyncio.sleep(0.5)
        async with again:
            # Decisions are made again, and the model is still the same process.
            await other.beat("worker-1", lambda beat: names(beat) == {unique})
            seen = len(other.beats)
            await asyncio.sleep(8.0)
            beats = [beat for beat in other.beats[seen:] if beat.worker == "worker-1"]
            assert beats
            assert all(names(beat) == {unique} for beat in beats)
            assert await running.engine_pid(unique) == pid
            assert side.holder(unique) == "worker-1"
            running.agent.stop()
            await running.task
