"""The single nats-server is restarted, or is away for a while, in the middle of streams."""

import asyncio
import os
import signal
import time
from pathlib import Path

import httpx
import pytest
from failover_streams import KINDS, Told, bodies, run
from fleet import MODEL, ROUTERS, WORKERS, Fleet, running_fleet

from shared import subjects
from shared.bus import Bus
from shared.kv import DEMAND, MODELS, ROLES, Kv
from shared.settings import decode_settings, encode_settings
from shared.snapshot import ModelSettings

pytestmark = [pytest.mark.model, pytest.mark.chaos, pytest.mark.timeout(600)]

STREAMS = int(os.environ.get("MESH_CHAOS_STREAMS", "50"))


def asked(count: int) -> list[tuple[str, dict]]:
    each = -(-count // len(KINDS))
    every = [(kind, body) for kind in KINDS for body in bodies(MODEL, kind, each, 70)]
    return every[:count]


async def write(fleet: Fleet) -> None:
    async with connected(fleet) as bus:
        kv = Kv(bus)
        await kv.make(MODELS)
        settings = encode_settings(ModelSettings(MODEL, minimum=1, maximum=3, priority=7))
        await kv.update(MODELS, subjects.model_key(MODEL), settings, 0)


def connected(fleet: Fleet):
    return Bus.connect(fleet.nats.url_for("mesh-1"), identity="mesh-1", kind="mesh")


async def kept(fleet: Fleet) -> None:
    """What was set is still set, and what workers and routers had told is told."""
    async with connected(fleet) as bus:
        kv = Kv(bus)
        entry = await kv.get(MODELS, subjects.model_key(MODEL))
        assert entry is not None
        assert entry.value is not None
        assert decode_settings(entry.value).priority == 7
        held = {entry.key for entry in await kv.read(ROLES) if entry.value}
        assert held == {subjects.lease_key(MODEL, number) for number in range(len(WORKERS))}
        assert await kv.read(DEMAND)


async def recovered(fleet: Fleet) -> tuple[float, float]:
    """Seconds until both routers serve from both workers, and until each has answered anew.

    The second ones share the processors with what goes on.
    """
    began = time.monotonic()
    ready = await fleet.until(fleet.serves)
    async with httpx.AsyncClient(timeout=100, trust_env=False) as client:
        for url in fleet.urls:
            body = bodies(MODEL, "greedy", 1, 4)[0] | {"stream": False}
            body.pop("stream_options")
            assert (await client.post(f"{url}/chat/completions", json=body)).status_code == 200
    return ready, time.monotonic() - began


def judged(whole: list[Told], told: list[Told], since: float, story: str) -> None:
    """Each stream is whole, with the undisturbed text, or ends with an error event."""
    ended = [mine for mine in told if mine.whole]
    failed = [mine for mine in told if not mine.whole]
    equal = sum(a.said == b.said for a, b in zip(whole, told, strict=True) if b.whole)
    for mine in failed:
        assert mine.error, story
        # A break or a time-out of the connection is no clear word.
        assert "NATS is away" in mine.error or "answer" in mine.error, f"{mine.error}\n{story}"
    last = max((mine.ended for mine in failed), default=since) - since
    print(f"{len(ended)} of {len(told)} whole ({sum(m.resumed > 0 for m in ended)} resumed),")
    print(f"{equal} of them equal; {len(failed)} ended with an error, the last after {last:.1f} s")
    for words in sorted({mine.error for mine in failed}):
        print(f"  {words}")
    if ended:
        ended.sort(key=lambda mine: mine.longest_gap)
        pauses = [f"{mine.longest_gap:.1f} s" for mine in (ended[len(ended) // 2], ended[-1])]
        print(f"  longest pause: median {pauses[0]}, at most {pauses[1]} ({ended[-1].kind})")
    assert equal >= 0.98 * len(ended) - 1, story


async def disturbed(fleet: Fleet, count: int, away: float, number: signal.Signals) -> None:
    whole = await run(fleet.urls, asked(count))
    assert all(mine.whole for mine in whole), fleet.story()
    await write(fleet)
    cut = asyncio.Event()
    loop = asyncio.get_running_loop()
    gone = 0.0

    def end(_: list[Told]) -> None:
        nonlocal gone
        gone = time.monotonic()
        os.kill(fleet.nats.pid, number)
        loop.call_soon_threadsafe(cut.set)

    async def come_back() -> tuple[float, float]:
        await cut.wait()
        await fleet.nats.__aexit__(None, None, None)
        if away:
            await while_away(fleet, gone + away)
        await fleet.nats.__aenter__()
        return await recovered(fleet)

    coming = asyncio.create_task(come_back())
    told = await run(fleet.urls, asked(count), end)
    ready, answered = await coming
    print(f"\nNATS ended by {number.name}, away for {away:g} s:")
    judged(whole, told, gone, fleet.story())
    print(f"all parts were ready {ready:.1f} s after it was back,")
    print(f"and had answered new requests after {answered:.1f} s")
    await kept(fleet)
    await fleet.until(lambda: not fleet.busy(*WORKERS))
    assert ready < 5.0


async def while_away(fleet: Fleet, until: float) -> None:
    """Routers answer, and say why they cannot do more."""
    async with httpx.AsyncClient(timeout=20, trust_env=False) as client:
        while time.monotonic() < until:
            for name in ROUTERS:
                root = fleet.url(name).removesuffix("/v1")
                body = bodies(MODEL, "greedy", 1, 4)[0]
                refused = await client.post(f"{root}/v1/chat/completions", json=body)
                assert refused.status_code == 503, refused.text
                assert 1 <= int(refused.headers["retry-after"]) <= 60
                assert (await client.get(f"{root}/livez")).status_code == 200
                assert (await client.get(f"{root}/readyz")).status_code == 503
            await asyncio.sleep(0.5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
async def test_a_restart(tmp_path: Path, number: signal.Signals) -> None:
    async with running_fleet(tmp_path) as fleet:
        await disturbed(fleet, STREAMS, 0.0, number)


async def test_ten_seconds_away(tmp_path: Path) -> None:
    async with running_fleet(tmp_path) as fleet:
        await disturbed(fleet, STREAMS, 10.0, signal.SIGKILL)
