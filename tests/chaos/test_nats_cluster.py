"""Three NATS servers, of which one is lost, or leaves, in the middle of streams."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from failover_streams import Told, run
from fleet import WORKERS, Fleet, fleet_on, users
from test_nats_away import asked, judged, kept, recovered, write

from shared.broker import render_users
from tests.nats_cluster import NODES, NatsCluster

pytestmark = [pytest.mark.model, pytest.mark.chaos, pytest.mark.timeout(900)]

STREAMS = int(os.environ.get("MESH_CHAOS_STREAMS", "50"))
LAME_DUCK = signal.SIGUSR2
"""What `nats-server --signal ldm` sends."""


@pytest_asyncio.fixture(loop_scope="function")
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet[NatsCluster]]:
    identities = users()
    cluster = NatsCluster(
        tmp_path,
        users=render_users(identities),
        passwords={identity.name: identity.password for identity in identities},
    )
    try:
        cluster.start()
        await asyncio.to_thread(cluster.ready)
        async with fleet_on(cluster, tmp_path) as made:
            yield made
    finally:
        cluster.clear_away()


async def disturbed(fleet: Fleet[NatsCluster], number: int, what: signal.Signals) -> None:
    """End one server, and see that nothing accepted is lost and all is as it was."""
    cluster = fleet.nats
    whole = await run(fleet.urls, asked(STREAMS))
    assert all(mine.whole for mine in whole), fleet.story()
    gone = 0.0
    cut = asyncio.Event()
    loop = asyncio.get_running_loop()

    def end(_: list[Told]) -> None:
        nonlocal gone
        gone = time.monotonic()
        cluster.signal(number, what)
        loop.call_soon_threadsafe(cut.set)

    async def after() -> tuple[float, float]:
        await cut.wait()
        return await recovered(fleet)

    waiting = asyncio.create_task(after())
    told = await run(fleet.urls, asked(STREAMS), end)
    ready, answered = await waiting
    print(f"\n{NODES[number]} ended by {what.name}:")
    judged(whole, told, gone, fleet.story())
    print(f"all parts were ready {ready:.1f} s after it, had answered anew after {answered:.1f} s")
    assert all(mine.whole for mine in told), fleet.story()
    assert ready < 5.0
    await asyncio.to_thread(cluster.gone, number, 90.0)
    await kept(fleet)
    await fleet.until(lambda: not fleet.busy(*WORKERS))
    cluster.start(number)
    await asyncio.to_thread(cluster.ready)


async def test_each_may_be_lost(fleet: Fleet[NatsCluster]) -> None:
    """A follower, the leader, and one that leaves in order (lame duck)."""
    await write(fleet)
    follower = (fleet.nats.leader() + 1) % len(NODES)
    await disturbed(fleet, follower, signal.SIGKILL)
    await disturbed(fleet, fleet.nats.leader(), signal.SIGKILL)
    await disturbed(fleet, fleet.nats.leader(), LAME_DUCK)
