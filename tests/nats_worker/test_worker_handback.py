"""Attempts that a draining worker offers to others, and what it says of those that it loses."""

import asyncio

import psutil
import pytest

from shared.protocol import Delta, End, Fail, Handback
from worker import handing_back

pytestmark = pytest.mark.nats


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handing_back, "HANDBACK_SECONDS", 0.1)


def offers(asked) -> int:
    return sum(isinstance(frame, Handback) for frame in asked.frames)


async def test_what_runs_and_what_waits_is_offered_again_and_again_until_it_is_over(start, router):
    running = await start(slots=1)
    held = await router.ask("hold")
    await held.accepted()
    waiting = await router.ask("tokens=2", worker="worker-1")
    await waiting.accepted()
    assert offers(held) == 0

    running.agent.stop()
    await held.until(lambda asked: offers(asked) >= 3)
    await waiting.until(lambda asked: offers(asked) >= 1)
    # Taken elsewhere, or left by its client: the worker sees no difference.
    await router.cancel("worker-1", held.attempt)
    assert isinstance(await waiting.last(), End)
    await running.task


async def test_an_offer_that_nobody_takes_changes_nothing(start, router):
    running = await start()
    asked = await router.ask("tokens=8 every=0.1")
    await asked.until(lambda asked: any(isinstance(f, Delta) for f in asked.frames))
    running.agent.stop()

    assert isinstance(await asked.last(), End)
    assert asked.text == "".join(f"t{index} " for index in range(8))
    assert offers(asked) >= 1
    await running.task


async def test_a_worker_whose_attempts_are_all_taken_ends_at_once(start, router):
    running = await start(slots=4, grace=1000.0)
    held = [await router.ask("hold") for _ in range(4)]
    for asked in held:
        await asked.accepted()
    running.agent.stop()
    for asked in held:
        await asked.until(lambda asked: offers(asked) > 0)
    await router.cancel("worker-1", *(asked.attempt for asked in held))

    await asyncio.wait_for(running.task, 20)


async def test_what_dies_with_its_engine_may_go_on_elsewhere(start, router):
    running = await start()
    asked = await router.ask("hold")
    await asked.until(lambda asked: len(asked.frames) >= 2)
    psutil.Process(await running.engine_pid()).kill()

    last = await asked.last()
    assert isinstance(last, Fail)
    assert (last.code, last.lost) == ("worker_failed", True)


async def test_what_outlasts_the_grace_may_go_on_elsewhere(start, router):
    running = await start(grace=0.2)
    asked = await router.ask("hold")
    await asked.accepted()
    running.agent.stop()

    last = await asked.last()
    assert isinstance(last, Fail)
    assert last.lost
    await running.task


async def test_a_request_that_is_at_fault_itself_is_not_lost(start, router):
    await start()
    asked = await router.ask("tokens=1", deadline=1.0)

    last = await asked.last()
    assert isinstance(last, Fail)
    assert not last.lost
