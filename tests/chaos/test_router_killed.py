"""One of two routers is killed in the middle of streams."""

import asyncio
import time
from pathlib import Path

import httpx
import pytest
from failover_streams import Told, bodies, run
from fleet import MODEL, WORKERS, running_fleet

pytestmark = [pytest.mark.model, pytest.mark.timeout(300)]

ORPHANED = 900
"""Tokens: more than can be computed while the test looks. What is free then was given up."""
GOES_ON = 150


def asked(count: int) -> list[tuple[str, dict]]:
    """By turns for the router that is killed and for the other."""
    bodied = bodies(MODEL, "greedy", count, GOES_ON)
    for body in bodied[::2]:
        body["max_tokens"] = ORPHANED
    return [("greedy", body) for body in bodied]


@pytest.mark.parametrize("streams", [6, pytest.param(30, marks=pytest.mark.chaos)])
async def test_its_streams_break_and_all_else_goes_on(tmp_path: Path, streams: int) -> None:
    async with running_fleet(tmp_path) as fleet:
        killed = 0.0
        seen: list[Told] = []

        def kill(told: list[Told]) -> None:
            nonlocal killed
            seen.extend(told)
            killed = time.monotonic()
            fleet.kill("router-1")

        def orphans() -> int:
            """Attempts that run or wait beyond those of the other router."""
            others = sum(not one.ended for one in seen if one.url == fleet.url("router-2"))
            return fleet.busy(*WORKERS) - others

        async def ask(client: httpx.AsyncClient, number: int) -> int:
            body = bodies(MODEL, "greedy", number + 1, 8)[number] | {"stream": False}
            body.pop("stream_options")
            answer = await client.post(f"{fleet.url('router-2')}/chat/completions", json=body)
            return answer.status_code

        async def look() -> tuple[float, list[int]]:
            """Seconds until the workers have given up what nobody waits for; then, new requests."""
            await fleet.until(lambda: killed)
            await fleet.until(lambda: orphans() <= 0)
            seconds = time.monotonic() - killed
            async with httpx.AsyncClient(timeout=100, trust_env=False) as client:
                return seconds, await asyncio.gather(*(ask(client, n) for n in range(10)))

        looking = asyncio.create_task(look())
        told = await run(fleet.urls, asked(streams), kill)
        seconds, statuses = await looking

        broken = [mine for mine in told if mine.url == fleet.url("router-1")]
        others = [mine for mine in told if mine.url == fleet.url("router-2")]
        noticed = max(mine.ended for mine in broken) - killed
        print(f"\n{len(broken)} streams broke, the last {noticed:.2f} s after the kill")
        print(f"their slots were free after {seconds:.2f} s")
        for mine in broken:
            assert not mine.whole
            assert mine.error.startswith(("RemoteProtocolError", "ReadError")), mine.error
        for mine in others:
            assert mine.whole, f"{mine.error}\n{fleet.story()}"
            assert not mine.resumed
        assert statuses == [200] * 10
        await fleet.until(lambda: not fleet.busy(*WORKERS))
