"""The router alone: what it costs to carry tokens that cost nothing to make.

Starts a real nats-server, one router process and token workers, and puts load on the router over
HTTP. CPU is that of the router process alone, as the kernel counts it. The parts:

    streams    128 streams at 50 tokens/s, 64 tokens each, 512 of them over 128 connections; workers
               that step 16 streams at a time as engines with 16 slots do, then 1 and 64 at a time
    held       4,000 streams held together at 5 tokens/s
    requests   answers of one token in one piece, over 32 connections
    added      one stream at a time, alternately through the router and straight over NATS

With --url a running router is measured, whose workers must serve --model with stamped tokens at the
pace that the part wants; give its process as --pid router=PID.
"""

import asyncio
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import cyclopts
import uvloop

from loadtests.bus_client import BusClient, chat_request
from loadtests.figures import markdown, median_and_range, percentile
from loadtests.http_client import Client, Target
from loadtests.http_load import Result, closed_loop, held_streams, summary
from loadtests.procfs import raise_open_files
from loadtests.stack import Stack
from shared.bus import Bus
from shared.protocol import Message

Part = Literal["streams", "held", "requests", "added"]
PARTS: tuple[Part, ...] = ("streams", "held", "requests", "added")

PROMPT = "Say something about rivers."
STREAM_TOKENS = 64
HELD_INTERVAL = 0.2
HELD_SECONDS = 8.0
NEW_A_SECOND = 500
"""Streams opened a second; at 1,000 the machine's two cores are full before all are open."""
WIDTHS = (16, 1, 64)
TOKEN_WORKERS = 2


class Bench:
    """One run of all parts; `rows` collects every repetition."""

    def __init__(self, model: str, scale: float, pids: Mapping[str, int]) -> None:
        self.model = model
        self.scale = scale
        self.pids = pids
        self.target = Target("")
        self.rows: list[dict[str, Any]] = []

    def count(self, full: int) -> int:
        return max(64, int(full * self.scale))

    def request(self, tokens: int, *, stream: bool) -> bytes:
        body: dict[str, object] = {
            "model": self.model,
            "messages": [{"role": "user", "content": PROMPT}],
            "max_tokens": tokens,
            "temperature": 0,
            "stream": stream,
        }
        if stream:
            body["stream_options"] = {"include_usage": True}
        return self.target.post("/v1/chat/completions", body)

    def keep(self, part: str, result: Result) -> None:
        row = {"part": part, **summary(result, list(self.pids))}
        self.rows.append(row)
        print(json.dumps(row), flush=True)

    async def streams(self, part: str) -> None:
        request = [self.request(STREAM_TOKENS, stream=True)]
        await closed_loop(self.target, request, connections=128, count=128)
        count = self.count(512)
        result = await closed_loop(
            self.target, request, connections=128, count=count, pids=self.pids
        )
        self.keep(part, result)

    async def held(self, streams: int) -> None:
        ramp = max(3.0, streams / NEW_A_SECOND)
        tokens = int((ramp + HELD_SECONDS) / HELD_INTERVAL)
        result = await held_streams(
            self.target,
            self.request(tokens, stream=True),
            streams=streams,
            ramp=ramp,
            pids=self.pids,
        )
        self.keep("held", result)

    async def requests(self) -> None:
        request = [self.request(1, stream=False)]
        await closed_loop(self.target, request, connections=32, count=self.count(1000))
        count = self.count(10000)
        result = await closed_loop(
            self.target, request, connections=32, count=count, pids=self.pids
        )
        self.keep("requests", result)

    async def added(self, nats: str | None) -> None:
        count, through, straight = self.count(400), [], []
        client = Client(self.target)
        request = self.request(4, stream=True)
        for _ in range(30):
            await client.send(request)
        if nats is None:
            through = [(await client.send(request)).ttft for _ in range(count)]
        else:
            async with Bus.connect(nats, identity="client-1", kind="router") as bus:
                direct = BusClient(bus)
                await direct.open()
                message = (Message("user", PROMPT),)
                for _ in range(count):
                    straight.append((await direct.send(chat_request(self.model, message, 4))).ttft)
                    reply = await client.send(request)
                    if reply.error:
                        raise SystemExit(f"added: {reply.error}")
                    through.append(reply.ttft)
        client.abort()
        row: dict[str, Any] = {"part": "added", "http_ms": _spread(through)}
        if straight:
            row["direct_ms"] = _spread(straight)
            row["added_ms"] = {
                q: round(row["http_ms"][q] - row["direct_ms"][q], 3) for q in ("p50", "p99")
            }
        self.rows.append(row)
        print(json.dumps(row), flush=True)


def _spread(values: list[float]) -> dict[str, float]:
    return {f"p{q}": round(percentile(values, q / 100) * 1e3, 3) for q in (50, 99)}


def report(rows: list[dict[str, Any]], streams: int) -> str:
    """Write the table: medians of all repetitions, with their range."""
    lines: list[tuple[str, str, str]] = []

    def of(part: str, *path: str) -> list[float]:
        found: list[float] = []
        for row in rows:
            value: Any = row if row["part"] == part else None
            for key in path:
                value = value.get(key) if isinstance(value, dict) else None
            if isinstance(value, int | float):
                found.append(value)
        return found

    def add(part: str, what: str, wanted: str, *path: str) -> None:
        if values := of(part, *path):
            lines.append((what, median_and_range(values), wanted))

    router = ("processes", "router-1")
    for width in WIDTHS:
        part = f"streams-{width}"
        each = f"128 x 50 tok/s, steps of {width}"
        wanted = "at most 35, aim 25" if width == WIDTHS[0] else ""
        add(part, f"us router CPU a token, {each}", wanted, *router, "us_per_token")
        add(part, f"us nats-server CPU a token, {each}", "", "processes", "nats", "us_per_token")
        add(part, f"token under way, ms p99, {each}", "", "lag_ms", "p99")
    held = f"{streams:,} x 5 tok/s"
    add("held", f"us router CPU a token, {held}", "", *router, "us_per_token")
    add("held", f"streams held, {held}", f"{streams:,}", "held")
    add("held", f"late (TTFT > 1 s), {held}", "0", "late")
    add("held", f"gap between tokens, ms p99, {held}", "at most 400", "gap_ms", "p99")
    add("held", f"router RSS, MB, {held}", "at most 300, aim 200", *router, "rss_mb")
    add("requests", "requests/s, 32 connections", "at least 1,500", "requests_per_second")
    add("requests", "us router CPU a request", "", *router, "us_per_request")
    add("added", "TTFT through the router, ms p50", "", "http_ms", "p50")
    add("added", "TTFT straight over NATS, ms p50", "", "direct_ms", "p50")
    add("added", "added TTFT, ms p50", "", "added_ms", "p50")
    add("added", "added TTFT, ms p99", "", "added_ms", "p99")
    errors = sum(sum(row.get("errors", {}).values()) for row in rows)
    lines.append(("errors in all runs", str(errors), "0"))
    return markdown(("figure", "median [range]", "wanted"), lines)


async def _token_workers(stack: Stack, bench: Bench, **options: object) -> None:
    """Replace the token workers, and wait until the router lists them and not their forerunners."""
    for number in range(1, TOKEN_WORKERS + 1):
        name = f"worker-{number}"
        if name in stack.children:
            await stack.stop(name)
    arguments = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    for number in range(1, TOKEN_WORKERS + 1):
        await stack.token_worker(f"worker-{number}", f"--model={bench.model}", *arguments)
    await stack.wait_model("router-1", "worker-1", bench.model)
    await asyncio.sleep(1.0)


async def measure(parts: tuple[Part, ...], reps: int, streams: int, scale: float) -> Bench:
    """Measure a router of our own."""
    async with Stack(workers=TOKEN_WORKERS) as stack:
        port = await stack.router("router-1")
        wanted = ("nats", "router-1")
        bench = Bench("tokens", scale, {name: stack.pids[name] for name in wanted})
        bench.target = Target(f"http://127.0.0.1:{port}")
        for _ in range(reps):
            if "streams" in parts:
                for width in WIDTHS:
                    # Several processes share the streams; each step has so many of one process.
                    await _token_workers(stack, bench, interval_ms=20, step_streams=width)
                    await bench.streams(f"streams-{width}")
            if "held" in parts:
                await _token_workers(stack, bench, interval_ms=HELD_INTERVAL * 1e3)
                await bench.held(streams)
            if "requests" in parts or "added" in parts:
                await _token_workers(stack, bench, interval_ms=0)
            if "requests" in parts:
                await bench.requests()
            if "added" in parts:
                await bench.added(stack.url("client-1"))
        return bench


async def measure_running(
    url: str, model: str, parts: tuple[Part, ...], reps: int, streams: int, pids: dict[str, int]
) -> Bench:
    """Measure a router that runs already."""
    bench = Bench(model, 1.0, pids)
    bench.target = Target(url)
    for _ in range(reps):
        if "streams" in parts:
            await bench.streams(f"streams-{WIDTHS[0]}")
        if "held" in parts:
            await bench.held(streams)
        if "requests" in parts:
            await bench.requests()
        if "added" in parts:
            await bench.added(None)
    return bench


app = cyclopts.App(help=__doc__)


@app.default
def main(
    *,
    reps: int = 5,
    part: tuple[Part, ...] = PARTS,
    streams: int = 4000,
    scale: float = 1.0,
    url: str = "",
    model: str = "tokens",
    pid: tuple[str, ...] = (),
    json_file: Annotated[Path | None, cyclopts.Parameter(name="--json")] = None,
) -> None:
    """Print the table of the router's figures.

    Args:
        reps: repetitions, of which the median is shown
        part: which parts to run; may be given several times
        streams: streams held together
        scale: share of the requests to send, for a quick look
        url: a running router, instead of one of our own
        model: the name to ask for, with --url
        pid: router-1=PID, with --url
        json_file: where to write every repetition
    """
    raise_open_files(2 * streams + 1024)
    started = time.monotonic()
    if url:
        pids = {name: int(number) for name, number in (item.split("=", 1) for item in pid)}
        bench = uvloop.run(measure_running(url, model, part, reps, streams, pids))
    else:
        bench = uvloop.run(measure(part, reps, streams, scale))
    if json_file is not None:
        json_file.write_text("".join(json.dumps(row) + "\n" for row in bench.rows))
    print(f"\n{report(bench.rows, streams)}\n")
    print(f"{reps} repetitions in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    app()
