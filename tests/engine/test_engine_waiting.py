"""The engine's queue, with every slot taken: whose time is up, and who is next."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from asking import frames_of, idle, request
from engine_driver import EngineDriver

from shared.protocol import Delta, End, Fail, Sampling

pytestmark = [pytest.mark.model, pytest.mark.asyncio(loop_scope="module")]

SLOTS = 4


async def until_running(engine: EngineDriver, count: int) -> None:
    async with asyncio.timeout(20):
        while engine.stats is None or engine.stats.running != count:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


@asynccontextmanager
async def all_slots_taken(engine: EngineDriver) -> AsyncIterator[None]:
    """Streams in every slot that would go on for longer than any test."""
    endless = Sampling(seed=1, temperature=0, ignore_eos=True)
    streams = [engine.submit(request(max_tokens=900, sampling=endless)) for _ in range(SLOTS)]
    for stream in streams:
        assert isinstance(await anext(stream), Delta)
    await until_running(engine, SLOTS)
    yield
    for stream in streams:
        await stream.aclose()


async def test_a_request_that_comes_too_late_is_told_so(engine):
    (frame,) = await frames_of(engine, request(deadline=time.time() - 1))

    assert isinstance(frame, Fail)
    assert frame.code == "deadline_exceeded"


async def test_what_expires_in_the_queue_is_never_computed(engine):
    async with all_slots_taken(engine):
        computed = engine.stats.prompt_tokens
        frames = await frames_of(engine, request(deadline=time.time() + 0.4))
    await idle(engine)

    assert [type(frame) for frame in frames] == [Fail]
    assert frames[0].code == "deadline_exceeded"
    assert engine.stats.prompt_tokens == computed


async def in_order(engine: EngineDriver, wanted: list[tuple[str, dict[str, str]]]) -> list[str]:
    """Ask with all slots taken; the names in the order in which they were answered."""
    answered: list[str] = []

    async def ask(name: str, fields: dict[str, str]) -> None:
        frames = await frames_of(engine, request(max_tokens=2, **fields))
        assert isinstance(frames[-1], End)
        answered.append(name)

    endless = Sampling(seed=1, temperature=0, ignore_eos=True)
    streams = [engine.submit(request(max_tokens=900, sampling=endless)) for _ in range(SLOTS)]
    for stream in streams:
        await anext(stream)
    tasks = []
    for waiting, (name, fields) in enumerate(wanted, 1):
        tasks.append(asyncio.create_task(ask(name, fields)))
        await until_waiting(engine, waiting)
    # One slot, so that those who wait go through it one by one.
    await streams.pop().aclose()
    await asyncio.gather(*tasks)
    for stream in streams:
        await stream.aclose()
    await idle(engine)
    return answered


async def until_waiting(engine: EngineDriver, count: int) -> None:
    async with asyncio.timeout(20):
        while engine.stats is None or engine.stats.waiting != count:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_interactive_requests_go_before_batch_that_came_first(engine):
    batch = {"priority": "batch"}
    order = await in_order(engine, [("batch", batch), ("one", {}), ("two", {})])

    assert order == ["one", "two", "batch"]


async def test_owners_take_turns(engine):
    heavy = [(f"heavy {n}", {"owner": "heavy"}) for n in range(4)]
    order = await in_order(engine, [*heavy, ("light", {"owner": "light"})])

    assert order.index("light") <= 2
    assert [name for name in order if name != "light"] == [name for name, _ in heavy]
