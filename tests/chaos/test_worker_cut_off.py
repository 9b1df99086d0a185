"""A worker that nobody hears any more, in the middle of streams: cut off, or stopped."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from failover_streams import KINDS, Told, bodies, run
from fleet import MODEL, WORKERS, Fleet, running_fleet

from loadtests.wire_proxy import WireProxy

pytestmark = [pytest.mark.model, pytest.mark.chaos, pytest.mark.timeout(900)]

EACH = int(os.environ.get("MESH_CHAOS_STREAMS", "20")) // len(KINDS)
"""Streams of a kind at once."""
ROUNDS = 3


@contextlib.asynccontextmanager
async def system(folder: Path) -> AsyncIterator[tuple[Fleet, WireProxy]]:
    async with WireProxy().running() as proxy:

        def through(worker: str, url: str) -> str:
            return proxy.url(url) if worker == WORKERS[0] else url

        async with running_fleet(folder, through) as fleet:
            yield fleet, proxy


@pytest.mark.parametrize("how", ["cut off", "stopped"])
async def test_its_streams_go_on_elsewhere(tmp_path: Path, how: str) -> None:
    victim = WORKERS[0]
    equal = total = moved = alike = 0
    pauses: list[float] = []
    async with system(tmp_path) as (fleet, proxy):
        loop = asyncio.get_running_loop()

        def processes():
            worker = fleet.process(victim)
            return (*worker.children(), worker)

        def lose(_: list[Told]) -> None:
            if how == "cut off":
                loop.call_soon_threadsafe(proxy.cut)
            else:
                for process in processes():
                    process.suspend()

        def bring_back() -> None:
            if how == "cut off":
                proxy.mend()
            else:
                for process in processes():
                    process.resume()

        for _ in range(ROUNDS):
            asked = [(kind, body) for kind in KINDS for body in bodies(MODEL, kind, EACH, 70)]
            whole = await run(fleet.urls, asked)
            control = (await run(fleet.urls, asked[::-1]))[::-1]
            try:
                told = await run(fleet.urls, asked, lose)
            finally:
                bring_back()
            for one, other, mine in zip(whole, control, told, strict=True):
                assert mine.whole, f"{mine.kind}: {mine.error}\n{fleet.story()}"
                total += 1
                moved += mine.resumed > 0
                equal += one.said == mine.said
                alike += one.said == other.said
                if mine.resumed:
                    pauses.append(mine.longest_gap)
            # It is back by itself, and has nothing left of what was moved.
            await fleet.until(fleet.serves)
            await fleet.until(lambda: victim in fleet.heard.workers and not fleet.busy(*WORKERS))
    pauses.sort()
    print(f"\nworker {how}: {moved} of {total} streams went on elsewhere, {equal} equal")
    print(f"in the control {alike}; longest pauses {pauses[len(pauses) // 2]:.1f} s at the median,")
    print(f"{pauses[-1]:.1f} s at most")
    assert moved
    assert equal >= min(0.98 * total, alike - 0.02 * total)
