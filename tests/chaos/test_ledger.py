"""Random failures under mixed load, and a ledger: every request that was sent has one outcome.

An answer in whole, a status or an event with an error, or, of a router that was killed meanwhile, a
connection that breaks. Nothing hangs, and when all is over nothing is left of it.
"""

import asyncio
import json
import os
import random
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from clocks import Clocks
from disturbing import Chaos
from failover_streams import KINDS, bodies
from fleet import MODEL, ROUTERS, WORKERS, Fleet, free_port, running_fleet
from leaks import held, more
from small_disk import small_disk

from loadtests.wire_proxy import WireProxy
from shared.broker import NatsServer

pytestmark = [pytest.mark.model, pytest.mark.timeout(3600)]

DEADLINE = 40
"""Seconds that a request gives the mesh."""
HUNG = DEADLINE + 20.0
"""Seconds without an end after which a request hangs."""
CLIENTS = 6


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
        self._kills: list[tuple[str, float, float]] = []

    def open(self, kind: str, router: str) -> Entry:
        entry = Entry(len(self.entries), kind, router, time.monotonic())
        self.entries.append(entry)
        return entry

    def killed(self, router: str, at: float, back: float) -> None:
        """A router was killed, and its successor was ready then."""
        self._kills.append((router, at, back))

    def excused(self, entry: Entry) -> bool:
        """Whether its router was killed while it was under way, or away when it came."""
        return any(
            entry.router == router and entry.begun <= back and entry.ended >= killed
            for router, killed, back in self._kills
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

    def __init__(self, fleet: Fleet[NatsServer], ledger: Ledger, seed: int) -> None:
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


async def nothing_left(fleet: Fleet[NatsServer], monitor: str, before: dict[str, int]) -> None:
    """Wait until nothing is held that was not before; an assertion names what is."""
    found: dict[str, tuple[int, int]] = {}

    async def none() -> bool:
        found.clear()
        found.update(more(await held(fleet, monitor), before))
        return not found

    try:
        await fleet.until(none)
    except AssertionError:
        raise AssertionError(f"left over, before and after: {found}\n{fleet.story()}") from None


@pytest.mark.parametrize(
    "seconds",
    [
        45.0,
        pytest.param(float(os.environ.get("MESH_CHAOS_SECONDS", "1800")), marks=pytest.mark.chaos),
    ],
)
async def test_every_request_has_one_outcome(tmp_path: Path, seconds: float) -> None:
    seed = int(os.environ.get("MESH_CHAOS_SEED", "1"))
    port = free_port()
    monitor = f"http://127.0.0.1:{port}"
    clocks = Clocks(tmp_path / "clocks", (*ROUTERS, *WORKERS))
    async with (
        WireProxy().running() as one,
        WireProxy().running() as two,
    ):
        wires = dict(zip(WORKERS, (one, two), strict=True))
        with small_disk(tmp_path / "nats") as disk:
            async with running_fleet(
                tmp_path,
                lambda name, url: wires[name].url(url),
                settings=clocks.settings,
                http_port=port,
            ) as fleet:
                ledger = Ledger()
                clients = Clients(fleet, ledger, seed)
                chaos = Chaos(fleet, ledger, wires, clocks, disk, seed + 1)
                before = await held(fleet, monitor)
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
                await nothing_left(fleet, monitor, before)
                print(f"before: {before}\nafter:  {await held(fleet, monitor)}")
