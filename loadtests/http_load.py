"""A load generator for any OpenAI-compatible URL, cheap enough to stay out of its own figures.

Two shapes of load. `closed_loop`: so many connections, each sends its next request when its last
was answered. `held_streams`: so many streams opened over a ramp and held together; gaps, CPU and
memory count only between the last stream's first token and the first stream's end.
"""

import asyncio
import contextlib
import json
import time
from array import array
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Annotated

import cyclopts
import msgspec
import uvloop

from loadtests.figures import percentile
from loadtests.http_client import Connection, Target
from loadtests.http_reply import Recorder, Reply
from loadtests.procfs import Cost, costs_of, raise_open_files, spent

__all__ = ("Result", "closed_loop", "held_streams")

LATE = 1.0
"""Seconds to the first token beyond which a stream counts as late."""

now = time.monotonic


class Result(msgspec.Struct):
    """What a run measured; times in seconds."""

    seconds: float
    replies: int
    errors: dict[str, int]
    ttft: Sequence[float]
    total: Sequence[float]
    gaps: Sequence[float]
    lags: Sequence[float]
    tokens: int
    """Events with text inside the measured window (stamped tokens one by one)."""
    completion_tokens: int
    """What the servers' own usage says, of all replies."""
    before: dict[str, Cost]
    after: dict[str, Cost]
    peak_rss: dict[str, int]
    held: int = 0
    reconnects: int = 0

    @property
    def late(self) -> int:
        return sum(value > LATE for value in self.ttft)

    @property
    def failed(self) -> int:
        return sum(self.errors.values())

    def microseconds(self, prefix: str, per: int) -> float:
        """CPU of the processes named `prefix...` divided by `per`, in microseconds."""
        return spent(self.before, self.after, prefix) / max(per, 1) * 1e6


class _Run:
    """The bookkeeping both shapes of load share."""

    def __init__(self, target: Target, connections: int, pids: Mapping[str, int]) -> None:
        self.recorder = Recorder()
        self.pids = pids
        self.connections = [
            Connection(target, self.recorder, self.on_reply) for _ in range(connections)
        ]
        self.replies: list[Reply] = []
        self.errors: dict[str, int] = {}
        self.wanted = 0
        self.all_done = asyncio.Event()
        self.peak: dict[str, int] = {}

    def on_reply(self, connection: Connection, reply: Reply) -> None:
        self.replies.append(reply)
        if reply.error:
            self.errors[reply.error] = self.errors.get(reply.error, 0) + 1
        if len(self.replies) >= self.wanted:
            self.all_done.set()

    async def finish(self, timeout: float) -> None:
        try:
            async with asyncio.timeout(timeout):
                await self.all_done.wait()
        except TimeoutError:
            self.errors["unfinished when the time was up"] = self.wanted - len(self.replies)
        for connection in self.connections:
            connection.abort()

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Take the peak of resident memory meanwhile."""

        async def watch() -> None:
            while True:
                for name, cost in costs_of(self.pids).items():
                    self.peak[name] = max(self.peak.get(name, 0), cost.rss)
                await asyncio.sleep(0.5)

        watcher = asyncio.create_task(watch())
        try:
            yield
        finally:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)

    def result(
        self, seconds: float, before: dict[str, Cost], after: dict[str, Cost], held: int = 0
    ) -> Result:
        good = [reply for reply in self.replies if not reply.error]
        return Result(
            seconds=seconds,
            replies=len(self.replies),
            errors=self.errors,
            ttft=array("d", (reply.ttft for reply in good if reply.first)),
            total=array("d", (reply.total for reply in good)),
            gaps=self.recorder.gaps,
            lags=self.recorder.lags,
            tokens=self.recorder.tokens,
            completion_tokens=sum(reply.usage.get("completion_tokens", 0) for reply in good),
            before=before,
            after=after,
            peak_rss={name: max(cost.rss, self.peak.get(name, 0)) for name, cost in after.items()},
            held=held,
            reconnects=sum(connection.reconnects for connection in self.connections),
        )


class _ClosedLoop(_Run):
    def __init__(
        self, target: Target, connections: int, pids: Mapping[str, int], requests: Sequence[bytes]
    ) -> None:
        super().__init__(target, connections, pids)
        self.requests = requests
        self.sent = 0

    def next(self, connection: Connection) -> None:
        if self.sent < self.wanted:
            request = self.requests[self.sent % len(self.requests)]
            self.sent += 1
            connection.send(request)

    def on_reply(self, connection: Connection, reply: Reply) -> None:
        super().on_reply(connection, reply)
        asyncio.get_running_loop().call_soon(self.next, connection)


async def closed_loop(
    target: Target,
    requests: Sequence[bytes],
    *,
    connections: int,
    count: int,
    timeout: float = 120.0,
    pids: Mapping[str, int] | None = None,
) -> Result:
    """Send `count` requests (in turn from `requests`) over `connections` connections."""
    run = _ClosedLoop(target, connections, pids or {}, requests)
    run.wanted = count
    async with run.watching():
        before, started = costs_of(run.pids), now()
        for connection in run.connections:
            run.next(connection)
        await run.finish(timeout)
        seconds, after = now() - started, costs_of(run.pids)
    return run.result(seconds, before, after)


class _Held(_Run):
    def __init__(self, target: Target, connections: int, pids: Mapping[str, int]) -> None:
        super().__init__(target, connections, pids)
        self.wanted = connections
        self.recorder.recording = False
        self.closed_at = 0.0
        self.at_close: dict[str, Cost] = {}

    def on_reply(self, connection: Connection, reply: Reply) -> None:
        if self.recorder.recording:
            self.close_window()
        super().on_reply(connection, reply)

    def close_window(self) -> None:
        self.recorder.recording = False
        self.closed_at, self.at_close = now(), costs_of(self.pids)

    def begun(self) -> int:
        return sum(1 for c in self.connections if c.reader is not None and c.reader.reply.first)


async def held_streams(
    target: Target,
    request: bytes,
    *,
    streams: int,
    ramp: float,
    timeout: float = 120.0,
    pids: Mapping[str, int] | None = None,
) -> Result:
    """Open `streams` streams evenly over `ramp` seconds, and measure while all of them live."""
    run = _Held(target, streams, pids or {})
    async with run.watching():
        opened = now()
        for index, connection in enumerate(run.connections):
            connection.send(request)
            if index % 10 == 9:
                await asyncio.sleep(max(0.0, opened + ramp * (index + 1) / streams - now()))
        for _ in range(250):
            if run.begun() + len(run.replies) >= streams:
                break
            await asyncio.sleep(0.02)
        held, started, before = run.begun(), now(), costs_of(run.pids)
        run.recorder.recording = held > 0
        await run.finish(timeout)
        if not run.closed_at:
            run.close_window()
    return run.result(run.closed_at - started, before, run.at_close, held)


def summary(result: Result, names: Sequence[str]) -> dict[str, object]:
    """Return the figures of a run as plain values; times in milliseconds."""

    def spread(values: Sequence[float]) -> dict[str, float] | None:
        if not values:
            return None
        return {f"p{q}": round(percentile(values, q / 100) * 1e3, 3) for q in (50, 90, 99)}

    return {
        "seconds": round(result.seconds, 3),
        "replies": result.replies,
        "requests_per_second": round(result.replies / result.seconds, 1),
        "tokens_per_second": round(result.tokens / result.seconds, 1),
        "completion_tokens": result.completion_tokens,
        "late": result.late,
        "held": result.held,
        "reconnects": result.reconnects,
        "ttft_ms": spread(result.ttft),
        "gap_ms": spread(result.gaps),
        "lag_ms": spread(result.lags),
        "total_ms": spread(result.total),
        "errors": result.errors,
        "processes": {
            name: {
                "us_per_token": round(result.microseconds(name, result.tokens), 2),
                "us_per_request": round(result.microseconds(name, result.replies), 1),
                "rss_mb": round(result.peak_rss[name] / 1e6, 1),
            }
            for name in names
        },
    }


app = cyclopts.App(help=__doc__)


@app.default
def main(
    url: str,
    *,
    model: str,
    connections: Annotated[int, cyclopts.Parameter(alias="-c")] = 32,
    count: Annotated[int, cyclopts.Parameter(alias="-n")] = 1000,
    hold: int = 0,
    ramp: float = 4.0,
    max_tokens: int = 64,
    stream: bool = True,
    prompt: str = "Say something about rivers.",
    key: str = "",
    timeout: float = 120.0,
    pid: tuple[str, ...] = (),
) -> None:
    """Put load on `url` (scheme, host and port) and print the figures as JSON.

    Args:
        url: base address without /v1
        model: name of the model to ask for
        connections: parallel connections of the closed loop
        count: requests of the closed loop
        hold: hold so many streams together instead
        ramp: seconds over which held streams are opened
        max_tokens: tokens of each answer
        stream: ask for server-sent events
        prompt: the user message
        key: API key
        timeout: seconds after which the run is given up
        pid: name=PID of a process to charge CPU and memory to; may be given several times
    """
    raise_open_files(min(20000, 4 * max(connections, hold) + 256))
    target = Target(url, key)
    body: dict[str, object] = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": stream,
    }
    if stream:
        body["stream_options"] = {"include_usage": True}
    request = target.post("/v1/chat/completions", body)
    pids = {name: int(number) for name, number in (item.split("=", 1) for item in pid)}

    async def go() -> Result:
        if hold:
            return await held_streams(
                target, request, streams=hold, ramp=ramp, timeout=timeout, pids=pids
            )
        return await closed_loop(
            target, [request], connections=connections, count=count, timeout=timeout, pids=pids
        )

    print(json.dumps(summary(uvloop.run(go()), list(pids)), indent=2))


if __name__ == "__main__":
    app()
