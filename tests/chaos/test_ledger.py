"""Random failures under mixed load, and a ledger: every request that was sent has one outcome.

An answer in whole, a status or an event with an error, or, of a router that was killed meanwhile, a
connection that breaks. Nothing hangs, and when all is over nothing is left of it.
"""

import asyncio
import json
import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from cutting_proxy import CuttingProxy
from failover_streams import KINDS, bodies
from fleet import MODEL, ROUTERS, WORKERS, Fleet, running_fleet

pytestmark = [pytest.mark.model, pytest.mark.timeout(3600)]

DEADLINE = 40
"""Seconds that a request gives the mesh."""
HUNG = DEADLINE + 20.0
"""Seconds without an end after which a request hangs."""
CLIENTS = 6
AWAY = 5.0
"""Seconds that a part stands still or is cut off, in the mean."""


@dataclass
class Entry:
    """One request."""

    number: int
    kind: str
    router: str
    begun: float
    ended: float = 0.0
    outcome: str = ""
    detail: str = ""


class Ledger:
    """All that was sent, and when routers were killed."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.kills: list[tuple[str, float, float]] = []
        """A router, when it was killed, and when its successor was ready."""

    def open(self, kind: str, router: str) -> Entry:
        entry = Entry(len(self.entries), kind, router, time.monotonic())
        self.entries.append(entry)
        return entry

    def excused(self, entry: Entry) -> bool:
        """Whether its router was killed while it was under way, or away when it came."""
        return any(
            entry.router == router and entry.begun <= back and entry.ended >= killed
            for router, killed, back in self.kills
        )

    def wrong(self) -> list[Entry]:
        """Those without an outcome that is one."""
        return [
            entry
            for entry in self.entries
            if entry.outcome not in ("answered", "told", "left")
            and not (entry.outcome == "broken" and self.excused(entry))
        ]

    def report(self) -> str:
        counted = Counter((entry.outcome, entry.detail[:90]) for entry in self.entries)
        lines = [f"{count:6} {what:9} {detail}" for (what, detail), count in counted.most_common()]
        return "\n".join(lines)


class Clients:
    """Ask for all kinds of answers, one after another; some leave in the middle."""

    def __init__(self, fleet: Fleet, ledger: Ledger, seed: int) -> None:
        self._fleet = fleet
        self._ledger = ledger
        self._draw = random.Random(seed)
        self.over = False

    async def run(self) -> None:
        """Until `over`."""
        async with (
            httpx.AsyncClient(timeout=HUNG, trust_env=False) as client,
            asyncio.TaskGroup() as group,
        ):
            for _ in range(CLIENTS):
                group.create_task(self._ask_on(client))

    async def _ask_on(self, client: httpx.AsyncClient) -> None:
        while not self.over:
            kind = self._draw.choice([*KINDS, "whole", "left"])
            router = self._draw.choice(ROUTERS)
            entry = self._ledger.open(kind, router)
            try:
                async with asyncio.timeout(HUNG):
                    await self._ask(client, entry)
            except TimeoutError:
                entry.outcome = "hung"
            except httpx.HTTPError as error:
                entry.outcome = "hung" if isinstance(error, httpx.TimeoutException) else "broken"
                entry.detail = f"{type(error).__name__}"
            entry.ended = time.monotonic()
            if entry.outcome != "answered":
                # As clients do that are told to come again; without it refusals are all there is.
                await asyncio.sleep(0.5)

    async def _ask(self, client: httpx.AsyncClient, entry: Entry) -> None:
        kind = entry.kind if entry.kind in KINDS else "greedy"
        (body,) = bodies(MODEL, kind, 1, self._draw.choice((8, 30, 80)))
        text = f"Tell me about case {entry.number}."
        body |= {"messages": [{"role": "user", "content": text}], "seed": entry.number}
        if entry.kind == "whole":
            body["stream"] = False
            del body["stream_options"]
        url = f"{self._fleet.url(entry.router)}/chat/completions"
        headers = {"X-Request-Timeout": str(DEADLINE)}
        async with client.stream("POST", url, json=body, headers=headers) as answer:
            if answer.status_code != 200:
                error = json.loads(await answer.aread())["error"]
                entry.outcome, entry.detail = "told", f"{answer.status_code} {error['code']}"
            elif entry.kind == "whole":
                read_whole(entry, json.loads(await answer.aread()))
            else:
                await read_stream(entry, answer, leave_after=5 if entry.kind == "left" else 0)


def read_whole(entry: Entry, answer: dict[str, Any]) -> None:
    (choice,) = answer["choices"]
    assert choice["finish_reason"]
    assert choice["message"]["content"]
    entry.outcome = "answered"


async def read_stream(entry: Entry, answer: httpx.Response, *, leave_after: int) -> None:
    """An outcome by the letter: `[DONE]` after a finish_reason, or an error and no `[DONE]`."""
    reason, error, events = "", "", 0
    async for line in answer.aiter_lines():
        if not line.startswith("data: "):
            continue
        events += 1
        if leave_after and events > leave_after:
            entry.outcome = "left"
            return
        if line == "data: [DONE]":
            assert reason
            assert not error
            entry.outcome = "answered"
            return
        chunk = json.loads(line.removeprefix("data: "))
        if "error" in chunk:
            error = chunk["error"]["code"] or chunk["error"]["message"]
            continue
        reason = next((c["finish_reason"] for c in chunk["choices"] if c["finish_reason"]), reason)
    # Ended as HTTP wants it, but not as a stream does.
    entry.outcome, entry.detail = ("told", f"event {error}") if error else ("cut", "no [DONE]")


class Chaos:
    """One failure after another, each mended before the next but for what takes its time."""

    def __init__(self, fleet: Fleet, ledger: Ledger, proxies: dict[str, CuttingProxy], seed: int):
        self._fleet = fleet
        self._ledger = ledger
        self._proxies = proxies
        self._draw = random.Random(seed)
        self.happened: Counter[str] = Counter()

    async def run(self, seconds: float) -> None:
        """For so long; at the end all parts run."""
        ways = (
            self.kill_worker,
            self.kill_engine,
            self.stop_worker,
            self.drain_worker,
            self.cut_worker_off,
            self.kill_router,
            self.restart_nats,
        )
        until = time.monotonic() + seconds
        # Each once, in an order of its own, before any comes again.
        waiting: list[Any] = []
        while time.monotonic() < until:
            waiting = waiting or self._draw.sample(ways, len(ways))
            way = waiting.pop()
            self.happened[way.__name__] += 1
            await way()
            await asyncio.sleep(self._draw.uniform(1, 6))
        await self._fleet.until(self._fleet.serves)

    async def kill_worker(self) -> None:
        name = self._worker()
        self._fleet.kill(name)
        await asyncio.sleep(self._draw.uniform(0, 3))
        self._start_worker(name)

    async def kill_engine(self) -> None:
        for engine in self._fleet.process(self._worker()).children():
            engine.kill()

    async def stop_worker(self) -> None:
        process = self._fleet.process(self._worker())
        family = [process, *process.children(recursive=True)]
        for one in family:
            one.suspend()
        await self._pause()
        for one in family:
            one.resume()

    async def drain_worker(self) -> None:
        name = self._worker()
        assert await self._fleet.end(name) == 0, self._fleet.story()
        self._start_worker(name)

    async def cut_worker_off(self) -> None:
        proxy = self._proxies[self._worker()]
        proxy.cut()
        await self._pause()
        proxy.mend()

    async def kill_router(self) -> None:
        name = self._draw.choice(ROUTERS)
        killed = time.monotonic()
        self._fleet.kill(name)
        self._fleet.start_router(name)
        await self._fleet.until(lambda: self._answers(name))
        self._ledger.kills.append((name, killed, time.monotonic()))

    async def restart_nats(self) -> None:
        os.kill(self._fleet.nats.pid, self._draw.choice((signal.SIGKILL, signal.SIGTERM)))
        await self._fleet.nats.__aexit__(None, None, None)
        await asyncio.sleep(self._draw.uniform(0, 2))
        await self._fleet.nats.__aenter__()

    def _worker(self) -> str:
        return self._draw.choice(WORKERS)

    def _start_worker(self, name: str) -> None:
        self._fleet.start_worker(name, self._proxies[name].url(self._fleet.nats.url_for(name)))

    async def _pause(self) -> None:
        await asyncio.sleep(self._draw.uniform(0.4 * AWAY, 1.6 * AWAY))

    async def _answers(self, router: str) -> bool:
        async with httpx.AsyncClient(timeout=5, trust_env=False) as client:
            try:
                await client.get(f"{self._fleet.url(router).removesuffix('/v1')}/livez")
            except httpx.HTTPError:
                return False
        return True


async def in_flight(fleet: Fleet) -> float:
    """What the routers count as not answered."""
    total = 0.0
    async with httpx.AsyncClient(timeout=10, trust_env=False) as client:
        for url in fleet.urls:
            text = (await client.get(f"{url.removesuffix('/v1')}/metrics")).text
            lines = [line for line in text.splitlines() if "mesh_router_in_flight{" in line]
            total += sum(float(line.split()[-1]) for line in lines)
    return total


def descriptors(fleet: Fleet) -> dict[str, int]:
    """Open ones, of each part."""
    return {name: fleet.process(name).num_fds() for name in (*ROUTERS, *WORKERS)}


@pytest.mark.parametrize(
    "seconds",
    [
        45.0,
        pytest.param(float(os.environ.get("MESH_CHAOS_SECONDS", "1800")), marks=pytest.mark.chaos),
    ],
)
async def test_every_request_has_one_outcome(tmp_path: Path, seconds: float) -> None:
    seed = int(os.environ.get("MESH_CHAOS_SEED", "1"))
    async with (
        CuttingProxy().running() as one,
        CuttingProxy().running() as two,
    ):
        proxies = dict(zip(WORKERS, (one, two), strict=True))
        async with running_fleet(tmp_path, lambda name, url: proxies[name].url(url)) as fleet:
            ledger = Ledger()
            clients = Clients(fleet, ledger, seed)
            chaos = Chaos(fleet, ledger, proxies, seed + 1)
            before = descriptors(fleet)
            async with asyncio.TaskGroup() as group:
                group.create_task(clients.run())
                try:
                    await chaos.run(seconds)
                finally:
                    clients.over = True
            print(f"\nseed {seed}, {seconds:.0f} s: {dict(chaos.happened)}")
            print(ledger.report())
            assert not ledger.wrong(), f"{ledger.wrong()}\n{fleet.story()}"
            answered = sum(entry.outcome == "answered" for entry in ledger.entries)
            # A ledger of refusals alone would show nothing.
            assert answered >= len(ledger.entries) / 3, ledger.report()
            await fleet.until(lambda: not fleet.busy(*WORKERS))
            assert await in_flight(fleet) == 0
            await fleet.until(
                lambda: all(now <= before[name] + 4 for name, now in descriptors(fleet).items())
            )
