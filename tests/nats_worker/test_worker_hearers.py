"""What a router that is gone had asked for is given up; what others have asked for goes on."""

import asyncio

import pytest

from shared.broker import NatsServer
from shared.bus import Bus

pytestmark = pytest.mark.nats


async def test_the_slots_of_a_router_that_is_gone_are_free_again(
    start, router, nats_server: NatsServer
):
    await start("tiny", slots=4)
    mine = await router.ask("tokens=60 every=0.05")
    async with Bus.connect(
        nats_server.url_for("router-2"), identity="router-2", kind="router"
    ) as bus:
        other = type(router)(bus)
        await other.open()
        running = [await other.ask("hold") for _ in range(2)]
        for asked in running:
            await asked.accepted()
        await router.model("worker-1", lambda model: model.free == 1)
        # For as long as it listens, nothing is taken from it.
        await asyncio.sleep(1.6)
        await router.model("worker-1", lambda model: model.free == 1)
    await router.model("worker-1", lambda model: model.free >= 3)
    await mine.last()
    assert mine.text == "".join(f"t{number} " for number in range(60))


async def test_a_request_that_waits_for_a_router_that_is_gone_is_given_up_too(
    start, router, nats_server: NatsServer
):
    await start("tiny", slots=1, queue=4)
    held = await router.ask("hold")
    await held.accepted()
    async with Bus.connect(
        nats_server.url_for("router-2"), identity="router-2", kind="router"
    ) as bus:
        other = type(router)(bus)
        await other.open()
        assert (await (await other.ask("hold", worker="worker-1")).accepted()).position == 1
        await router.model("worker-1", lambda model: model.queued == 1)
    await router.model("worker-1", lambda model: model.queued == 0)
    state = await router.model("worker-1", lambda model: True)
    assert (state.free, state.busy) == (0, 1)
