"""ASGI servers against each other, for what a router does: many streams of small events.

The same application (`sse_server`) under each server, one worker process each; `sse_server` tells
of its ways to write. The servers take turns within each repetition, so that a machine that slows
down slows all.
"""

import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import cyclopts
import msgspec
import uvloop

from loadtests.figures import markdown, median_and_range, percentile
from loadtests.http_client import Client, Connection, Target
from loadtests.http_reply import Recorder, Reply
from loadtests.procfs import Cost, cost_of, raise_open_files
from loadtests.stack import MAIN, StackFailed, free_port, get
from mesh.child import Child

now = time.monotonic

WAYS = {"router": "as the router", "place": "in place", "task": "by a task"}
CASES = (
    ("uvicorn", "router"),
    ("uvicorn", "place"),
    ("uvicorn", "task"),
    ("uvicorn-h11", "task"),
    ("granian", "place"),
    ("granian", "task"),
    ("hypercorn", "place"),
    ("hypercorn", "task"),
)
FAST_STREAMS = 32
FIRST_BYTES = 200
WINDOW = 1.5
"""Seconds of each measurement of throughput and CPU."""
LEAVING = 30
"""Clients that leave, half of them streaming, in each repetition."""


class Row(msgspec.Struct):
    """One server and way in one repetition; times in milliseconds."""

    server: str
    way: str
    first_p50: float
    first_p99: float
    events_per_second: float
    cores_at_most: float
    us_at_most: float
    us_paced: float
    lag_p99: float
    rss_mb: float
    left_streaming: list[float]
    left_waiting: list[float]
    unnoticed: int
    no_delay: bool
    kept_mb: float
    """What the server's memory grew by for a client that does not read."""


class Counting(asyncio.Protocol):
    """A client that only counts events."""

    def __init__(self, request: bytes) -> None:
        self.events = 0
        self.transport: Any = None
        self._request = request
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask."""
        self.transport = transport
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Count; an event may be cut anywhere, so what could be half a mark is kept."""
        data = self._rest + data
        self.events += data.count(b"data: {")
        self._rest = data[-6:]

    def close(self) -> None:
        """Leave."""
        if self.transport is not None:
            self.transport.abort()


class BenchServer:
    """Measures one server that runs, with one way of writing."""

    def __init__(self, name: str, way: str, port: int, pid: int) -> None:
        self.name = name
        self.way = way
        self.port = port
        self.pid = pid
        self.target = Target(f"http://127.0.0.1:{port}")

    def request(self, **wish: object) -> bytes:
        return self.target.post("/v1/wish", {"way": self.way, **wish})

    async def measure(self) -> Row:
        first = await self.first_byte()
        rate, busy = await self.at_most()
        row = await self.paced(first, rate, busy)
        row.kept_mb = await self.not_reading()
        return row

    async def first_byte(self) -> list[float]:
        client, request = Client(self.target), self.request(count=1)
        found = []
        for index in range(FIRST_BYTES + 20):
            reply = await client.send(request)
            if reply.error:
                raise SystemExit(f"{self.name}: {reply.error}")
            if index >= 20:
                found.append(reply.ttft * 1e3)
        client.abort()
        return found

    async def at_most(self) -> tuple[float, float]:
        """Return events a second, and cores used, with clients that read all they get."""
        loop, request = asyncio.get_running_loop(), self.request(interval=0)
        clients = [Counting(request) for _ in range(FAST_STREAMS)]
        for client in clients:
            await loop.create_connection(lambda c=client: c, "127.0.0.1", self.port)  # type: ignore[misc]
        await asyncio.sleep(0.5)
        began, cost = now(), cost_of(self.pid)
        events = sum(client.events for client in clients)
        await asyncio.sleep(WINDOW)
        events = sum(client.events for client in clients) - events
        seconds, used = now() - began, cost_of(self.pid).cpu - cost.cpu
        for client in clients:
            client.close()
        await asyncio.sleep(0.3)
        return events / seconds, used / seconds

    async def paced(self, first: list[float], rate: float, busy: float) -> Row:
        """128 streams with 50 events a second each; beside them, clients leave."""
        recorder, request = Recorder(), self.request(interval=0.02)
        recorder.recording = False
        ended: list[Reply] = []
        streams = [
            Connection(self.target, recorder, lambda _, reply: ended.append(reply))
            for _ in range(128)
        ]
        for stream in streams:
            stream.send(request)
            await asyncio.sleep(0.003)
        await asyncio.sleep(0.5)
        status, told = await get(self.port, f"/sockets?port={self.port}")
        no_delay = status == 200 and all(json.loads(told))
        before = self._begin(recorder)
        await asyncio.sleep(WINDOW)
        recorder.recording, after = False, cost_of(self.pid)
        streaming, waiting, unnoticed = await self.leaving()
        if ended:
            raise SystemExit(f"{self.name}: a stream ended: {ended[0]}")
        for stream in streams:
            stream.abort()
        return Row(
            server=self.name,
            way=self.way,
            first_p50=percentile(first, 0.5),
            first_p99=percentile(first, 0.99),
            events_per_second=rate,
            cores_at_most=busy,
            us_at_most=busy / rate * 1e6,
            us_paced=(after.cpu - before.cpu) / recorder.tokens * 1e6,
            lag_p99=percentile(recorder.lags, 0.99) * 1e3,
            rss_mb=after.rss / 1e6,
            left_streaming=streaming,
            left_waiting=waiting,
            unnoticed=unnoticed,
            no_delay=no_delay,
            kept_mb=0.0,
        )

    async def not_reading(self) -> float:
        """Return megabytes that a client costs within a second that asks for all and reads none."""
        await asyncio.sleep(0.3)
        before, client = cost_of(self.pid), Counting(self.request(interval=0))
        await asyncio.get_running_loop().create_connection(lambda: client, "127.0.0.1", self.port)
        client.transport.pause_reading()
        await asyncio.sleep(1.0)
        after = cost_of(self.pid)
        client.close()
        return (after.rss - before.rss) / 1e6

    def _begin(self, recorder: Recorder) -> Cost:
        recorder.recording = True
        return cost_of(self.pid)

    async def leaving(self) -> tuple[list[float], list[float], int]:
        """Return milliseconds until the application knew: of streaming clients, and of others."""
        at: dict[str, float] = {}
        for index in range(LEAVING):
            name = f"{self.way}-{now()}-{'stream' if index % 2 else 'wait'}"
            request = self.request(id=name, stream=bool(index % 2), interval=0.02)
            client = Connection(self.target, Recorder(), lambda *_: None)
            client.send(request)
            await asyncio.sleep(0.035)
            at[name] = now()
            client.abort()
        await asyncio.sleep(0.6)
        _, told = await get(self.port, "/seen")
        seen: dict[str, float] = json.loads(told)
        streaming = [(seen[n] - t) * 1e3 for n, t in at.items() if n in seen and "stream" in n]
        waiting = [(seen[n] - t) * 1e3 for n, t in at.items() if n in seen and "wait" in n]
        return streaming, waiting, len(at) - len(streaming) - len(waiting)


@asynccontextmanager
async def serving(name: str, folder: Path) -> AsyncIterator[tuple[int, int]]:
    """Run one server; yields its port and process id."""
    port = free_port()
    command = [sys.executable, "-c", MAIN.format(module="loadtests.sse_server"), name, str(port)]
    child = Child(name, command, dict(os.environ), folder / f"{name}.log")
    await child.start()
    try:
        await _until_up(child, port)
        assert child.pid is not None
        yield port, child.pid
    finally:
        await child.stop(10.0)


async def _until_up(child: Child, port: int) -> None:
    deadline = now() + 20
    while True:
        try:
            await get(port, "/seen")
            return
        except OSError:
            if child.pid is None or now() > deadline:
                raise StackFailed(f"{child.name} did not start: {child.last_words()}") from None
        await asyncio.sleep(0.05)


async def measure(cases: Sequence[tuple[str, str]], reps: int) -> list[Row]:
    """Measure every case, in turns."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="mesh-servers-") as folder:
        for _ in range(reps):
            for name, way in cases:
                # A process for each way: its memory is that way's own.
                async with serving(name, Path(folder)) as (port, pid):
                    row = await BenchServer(name, way, port, pid).measure()
                rows.append(row)
                print(json.dumps(msgspec.to_builtins(row)), flush=True)
    return rows


def report(rows: Sequence[Row], cases: Sequence[tuple[str, str]]) -> str:
    """Write the table: medians of all repetitions with their range, a column for each case."""
    columns = [[row for row in rows if (row.server, row.way) == case] for case in cases]
    figures: tuple[tuple[str, str], ...] = (
        (f"events/s at most, {FAST_STREAMS} streams", "events_per_second"),
        ("cores the server used there", "cores_at_most"),
        ("us CPU an event there", "us_at_most"),
        ("us CPU an event, 128 x 50/s", "us_paced"),
        ("event under way, ms p99, 128 x 50/s", "lag_p99"),
        ("first byte, ms p50", "first_p50"),
        ("first byte, ms p99", "first_p99"),
        ("RSS, MB, 128 streams", "rss_mb"),
        ("RSS added in 1 s by a client that does not read, MB", "kept_mb"),
    )
    lines = [
        (what, *(median_and_range([getattr(row, field) for row in mine]) for mine in columns))
        for what, field in figures
    ]
    for who, field in (("streaming", "left_streaming"), ("not streaming", "left_waiting")):
        for share in (0.5, 0.99):
            found = [[value for row in mine for value in getattr(row, field)] for mine in columns]
            shown = [f"{percentile(values, share):.2f}" if values else "-" for values in found]
            lines.append((f"client left until noticed, ms p{share * 100:.0f}, {who}", *shown))
    left = reps_of(columns) * LEAVING
    lines.append(
        (f"never noticed, of {left}", *(str(sum(r.unnoticed for r in m)) for m in columns))
    )
    told = ("yes" if all(row.no_delay for row in mine) else "no" for mine in columns)
    lines.append(("TCP_NODELAY set without being asked", *told))
    heads = ("figure", *(f"{server}, {WAYS[way]}" for server, way in cases))
    return markdown(heads, lines)


def reps_of(columns: Sequence[Sequence[Row]]) -> int:
    """How often each was measured."""
    return len(columns[0])


def versions() -> str:
    """Name what was measured."""
    names = ("uvicorn", "uvloop", "httptools", "h11", "granian", "hypercorn")
    return ", ".join(f"{name} {metadata.version(name)}" for name in names)


app = cyclopts.App(help=__doc__)


@app.default
def main(
    *,
    reps: int = 5,
    server: tuple[str, ...] = (),
    json_file: Annotated[Path | None, cyclopts.Parameter(name="--json")] = None,
) -> None:
    """Print the table of the servers' figures.

    Args:
        reps: repetitions, of which the median is shown
        server: which servers, and not all; may be given several times
        json_file: where to write every repetition
    """
    raise_open_files(4096)
    started = now()
    cases = [case for case in CASES if not server or case[0] in server]
    rows = uvloop.run(measure(cases, reps))
    if json_file is not None:
        json_file.write_text("".join(json.dumps(msgspec.to_builtins(r)) + "\n" for r in rows))
    print(f"\n{versions()}\n\n{report(rows, cases)}\n")
    print(f"{reps} repetitions in {now() - started:.0f} s")


if __name__ == "__main__":
    app()
