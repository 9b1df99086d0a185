"""A client that leaves: what the engine says of it, and when, beside others that stay."""

import asyncio
from typing import Any

import pytest
from asking import request
from engine_driver import EngineDriver

from shared.protocol import Sampling
from worker.link import Step

pytestmark = [pytest.mark.model]

ENDLESS = Sampling(seed=1, temperature=0, ignore_eos=True)


class Watching(EngineDriver):
    """A driver that keeps what the engine says."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.steps: list[Step] = []

    def _take(self, message: Any) -> None:
        if isinstance(message, Step):
            self.steps.append(message)
        super()._take(message)

    async def step_that_ended(self, attempt: int) -> Step:
        async with asyncio.timeout(20):
            while True:
                for step in self.steps:
                    if attempt in step.ended:
                        return step
                await asyncio.sleep(0.01)


async def test_a_freed_slot_is_told_before_the_next_step_of_those_who_stay(q4_0):
    engine = Watching(str(q4_0), slots=2, context=1024, threads=1)
    await engine.start()
    try:
        leaving, staying = (request(max_tokens=900, sampling=ENDLESS) for _ in range(2))
        stays, leaves = engine.submit(staying), engine.submit(leaving)
        await anext(stays)
        await anext(leaves)
        await leaves.aclose()
        told = await engine.step_that_ended(leaving.attempt)
        await anext(stays)
        await stays.aclose()
    finally:
        await engine.stop()

    # Tokens come at the end of a step; this word did not wait for one.
    assert told.mail == ()
    assert told.stats.running == 1
