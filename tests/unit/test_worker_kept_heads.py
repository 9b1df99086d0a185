"""Heads between two groups: who takes them, and when they are let go of."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from worker import kept_heads
from worker.kept_heads import KeptHeads
from worker.stages import Kind

KIND = Kind("big", "digest", 4, 8, slots=1, context=256, step=64)
MEMORY = 100


@pytest.fixture
async def task() -> AsyncIterator["asyncio.Task[Any]"]:
    made = asyncio.create_task(asyncio.Event().wait())
    yield made
    made.cancel()
    await asyncio.wait({made})


@pytest.fixture
def serving() -> Any:
    return SimpleNamespace(name="big", memory=MEMORY)


async def ended(task: "asyncio.Task[Any]") -> bool:
    async with asyncio.timeout(5):
        await asyncio.wait({task})
    return task.cancelled()


async def test_a_group_with_the_same_cuts_has_it_and_once(serving: Any, task: Any) -> None:
    kept = KeptHeads()
    kept.keep(serving, task, KIND)
    assert kept.tasks == (task,)
    assert kept.take("other", KIND, MEMORY) is None
    assert kept.take("big", KIND, MEMORY) == (serving, task)
    assert kept.take("big", KIND, MEMORY) is None
    assert kept.tasks == ()
    assert not task.cancelling()


@pytest.mark.parametrize(
    ("kind", "free"),
    [(KIND._replace(start=5), MEMORY), (KIND._replace(digest="x"), MEMORY), (KIND, MEMORY - 1)],
)
async def test_it_goes_where_it_does_not_fit(
    serving: Any, task: Any, kind: Kind, free: int
) -> None:
    kept = KeptHeads()
    kept.keep(serving, task, KIND)
    assert kept.take("big", kind, free) is None
    assert await ended(task)


async def test_it_goes_when_nobody_has_come_for_it(
    serving: Any, task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_heads, "KEEP_SECONDS", 0.05)
    KeptHeads().keep(serving, task, KIND)
    assert await ended(task)


async def test_one_that_was_taken_stays_though_its_time_is_over(
    serving: Any, task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_heads, "KEEP_SECONDS", 0.01)
    kept = KeptHeads()
    kept.keep(serving, task, KIND)
    assert kept.take("big", KIND, MEMORY) is not None
    await asyncio.sleep(0.1)
    assert not task.cancelling()


async def test_all_go_when_the_memory_is_wanted(serving: Any, task: Any) -> None:
    kept = KeptHeads()
    kept.keep(serving, task, KIND)
    kept.drop()
    assert kept.tasks == ()
    assert await ended(task)


async def test_one_whose_engine_has_ended_is_nobodys(serving: Any, task: Any) -> None:
    kept = KeptHeads()
    kept.keep(serving, task, KIND)
    kept.forget(SimpleNamespace(name="big", memory=MEMORY))  # type: ignore[arg-type]
    assert kept.tasks == (task,)
    kept.forget(serving)
    assert kept.take("big", KIND, MEMORY) is None
