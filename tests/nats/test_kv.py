"""Buckets on a real server: compare-and-set, reading without consumers, and what restarts do."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from shared import subjects
from shared.bus import Bus, BusUnavailable
from shared.kv import DEMAND, MODELS, ROLES, WORKERS, Bucket, Conflict, Entry, Kv

pytestmark = pytest.mark.nats

Connect = Callable[..., Awaitable[Bus]]


@pytest.fixture
async def mesh(connect: Connect) -> Kv:
    kv = Kv(await connect("mesh-1"))
    await kv.make(DEMAND, ROLES, WORKERS, MODELS)
    return kv


async def test_a_key_is_written_read_and_deleted(mesh: Kv, unique: str):
    assert await mesh.get(MODELS, unique) is None
    first = await mesh.put(MODELS, unique, b"one")
    assert await mesh.get(MODELS, unique) == Entry(unique, b"one", first)
    second = await mesh.update(MODELS, unique, b"two", first)
    assert second > first
    assert await mesh.get(MODELS, unique) == Entry(unique, b"two", second)
    gone = await mesh.delete(MODELS, unique, second)
    assert await mesh.get(MODELS, unique) is None
    assert Entry(unique, None, gone) in await mesh.read(MODELS)


async def test_a_write_with_a_wrong_revision_changes_nothing_and_tells_the_right_one(
    mesh: Kv, unique: str
):
    first = await mesh.create(MODELS, unique, b"one")
    for attempt in (
        mesh.create(MODELS, unique, b"x"),
        mesh.update(MODELS, unique, b"x", first + 1000),
        mesh.delete(MODELS, unique, first + 1000),
    ):
        with pytest.raises(Conflict) as caught:
            await attempt
        assert caught.value.revision == first
    assert await mesh.get(MODELS, unique) == Entry(unique, b"one", first)
    with pytest.raises(Conflict) as caught:
        await mesh.update(MODELS, f"{unique}-absent", b"x", first)
    assert caught.value.revision == 0


async def test_a_deletion_is_a_revision_until_it_is_forgotten(mesh: Kv, unique: str):
    first = await mesh.create(MODELS, unique, b"one")
    gone = await mesh.delete(MODELS, unique, first)
    with pytest.raises(Conflict) as caught:
        await mesh.create(MODELS, unique, b"two")
    assert caught.value.revision == gone
    assert await mesh.update(MODELS, unique, b"two", gone) > gone


async def test_one_of_many_creates_a_key(mesh: Kv, unique: str):
    tries = [mesh.create(MODELS, unique, b"%d" % number) for number in range(20)]
    done = await asyncio.gather(*tries, return_exceptions=True)
    revisions = [result for result in done if isinstance(result, int)]
    conflicts = [result for result in done if isinstance(result, Conflict)]
    assert (len(revisions), len(conflicts)) == (1, 19)
    assert {conflict.revision for conflict in conflicts} == set(revisions)


async def test_where_nothing_answers_the_told_writes_say_what_was_taken(
    connect: Connect, mesh: Kv, unique: str, eventually: Any
):
    worker = Kv(await connect("worker-1"))
    told: list[Entry] = []
    await worker.follow(ROLES, lambda entry: entry.key == key and told.append(entry))
    key = f"{unique}.0"
    for value in (b"first", b"second"):
        await worker.tell(ROLES, key, value, 0)
    await eventually(lambda: bool(told))
    await worker.tell(ROLES, key, b"wrong", told[0].revision + 100)
    await worker.tell(ROLES, key, b"right", told[0].revision)
    await worker.tell(ROLES, key, b"late", told[0].revision)
    await eventually(lambda: len(told) == 2)
    await worker.tell(ROLES, key, None, told[1].revision)
    await eventually(lambda: len(told) == 3)
    assert [entry.value for entry in told] == [b"first", b"right", None]


async def test_every_write_is_told_to_those_who_follow(connect: Connect, mesh: Kv, unique: str):
    follower = await connect("worker-1")
    told: list[Entry] = []
    await Kv(follower).follow(MODELS, told.append)
    await follower.barrier()
    first = await mesh.put(MODELS, unique, b"one")
    gone = await mesh.delete(MODELS, unique, first)
    again = await mesh.update(MODELS, unique, b"two", gone)
    await follower.barrier()
    wanted = [Entry(unique, b"one", first), Entry(unique, None, gone), Entry(unique, b"two", again)]
    assert [entry for entry in told if entry.key == unique] == wanted


async def test_more_keys_than_a_page_has_are_all_read(connect: Connect, mesh: Kv, unique: str):
    router = Kv(await connect("router-1"))
    count = 1203
    for number in range(count):
        await router.tell(DEMAND, f"{unique}-{number}.router-1", b"%d" % number)
    await router.put(DEMAND, f"{unique}-0.router-1", b"again")
    found = {
        entry.key: entry.value
        for entry in await mesh.read(DEMAND)
        if entry.key.startswith(f"{unique}-")
    }
    wanted = {f"{unique}-{number}.router-1": b"%d" % number for number in range(count)}
    assert found == wanted | {f"{unique}-0.router-1": b"again"}


async def test_an_empty_bucket_reads_as_empty(own_server: Any, connect: Connect):
    async with own_server() as server:
        kv = Kv(await connect("router-1", server=server))
        await kv.make(MODELS)
        assert await kv.read(MODELS) == []


async def test_making_what_is_there_leaves_it_as_it_is(mesh: Kv, unique: str):
    revision = await mesh.put(MODELS, unique, b"kept")
    other = Bucket(MODELS.name, ttl=1.0, largest=1 << 20)
    await mesh.make(MODELS, other)
    assert await mesh.get(MODELS, unique) == Entry(unique, b"kept", revision)


async def test_a_bucket_that_is_not_there_is_named(own_server: Any, connect: Connect):
    async with own_server() as server:
        kv = Kv(await connect("router-1", server=server))
        for attempt in (
            kv.read(ROLES),
            kv.get(ROLES, "a.0"),
            kv.put(DEMAND, subjects.demand_key("a", "router-1"), b""),
        ):
            with pytest.raises(BusUnavailable, match=r"mesh-(roles|demand)"):
                await attempt


async def test_what_is_told_without_an_answer_expires_by_itself(
    connect: Connect, own_server: Any, eventually: Any
):
    brief = Bucket(subjects.WORKERS, ttl=1.0, largest=1 << 20)
    async with own_server() as server:
        mesh = Kv(await connect("mesh-1", server=server))
        await mesh.make(brief)
        worker = Kv(await connect("worker-1", server=server))
        told: list[Entry] = []
        await mesh.follow(brief, told.append)
        await mesh._bus.barrier()
        began = time.monotonic()
        await worker.tell(brief, "worker-1", b"here")
        await eventually(lambda: bool(told))
        held = await mesh.get(brief, "worker-1")
        # A machine that stood still meanwhile has let it expire.
        assert held == told[0] or time.monotonic() - began >= brief.ttl
        async with asyncio.timeout(20):
            while await mesh.get(brief, "worker-1") is not None:  # noqa: ASYNC110 - no event tells it
                await asyncio.sleep(0.05)


async def test_a_restart_of_the_server_keeps_what_was_written_and_those_who_follow(
    own_server: Any, connect: Connect, eventually: Any
):
    first = own_server()
    async with first:
        mesh_bus, worker = [await connect(name, server=first) for name in ("mesh-1", "worker-1")]
        mesh = Kv(mesh_bus)
        await mesh.make(MODELS, ROLES)
        told: list[Entry] = []
        claimed: list[Entry] = []
        await Kv(worker).follow(MODELS, told.append)
        await Kv(worker).follow(ROLES, claimed.append)
        await worker.barrier()
        kept = await mesh.put(MODELS, "kept", b"1")
        await Kv(worker).tell(ROLES, "m.0", b"worker-1", 0)
        await eventually(lambda: bool(claimed))
    # The process is gone; that its connection is, comes with the loop's next look at it.
    await eventually(lambda: not mesh_bus.connected)
    with pytest.raises(BusUnavailable, match="NATS is away"):
        await mesh.get(MODELS, "kept")
    async with own_server(port=first.port):
        await eventually(lambda: mesh_bus.connected and worker.connected)
        assert await mesh.get(MODELS, "kept") == Entry("kept", b"1", kept)
        # Whoever is back may follow a little later than another one writes.
        await worker.barrier()
        new = await mesh.update(MODELS, "kept", b"2", kept)
        await worker.barrier()
        assert told[-1] == Entry("kept", b"2", new)
        held = await mesh.get(ROLES, "m.0")
        assert held is not None
        assert held.value == b"worker-1"


async def test_a_server_that_stands_still_ends_no_call_beyond_its_timeout(
    own_server: Any, connect: Connect, pause: Any
):
    async with own_server() as server:
        bus = await connect("mesh-1", server=server)
        await Kv(bus).make(MODELS)
        kv = Kv(bus, timeout=0.2)
        await pause(server)
        for attempt in (kv.read(MODELS), kv.get(MODELS, "a"), kv.put(MODELS, "a", b"")):
            with pytest.raises(BusUnavailable, match=r"within 0.2 s"):
                await attempt
