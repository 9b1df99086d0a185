"""Clients that read a byte a second, beside others that read as the tokens come.

The router and NATS are real; token workers emit, so that what is measured is not the engine. The
normal clients' streams are held once alone and once beside the slow ones, in turns; what counts is
the pause between two arrivals at the normal ones, and what the router keeps for those who do not
read. Slow clients have the smallest receive buffer that the kernel allows, so that it is the router
whose buffers fill.
"""

import asyncio
import contextlib
import socket
import statistics
import sys
from collections.abc import AsyncIterator

import cyclopts
import msgspec
import uvloop

from loadtests.figures import markdown, median_and_range, percentile
from loadtests.http_client import Target
from loadtests.http_load import Result, held_streams
from loadtests.procfs import cost_of, raise_open_files
from loadtests.stack import Stack

MODEL = "tokens"
INTERVAL_MS = 50.0
"""Between two tokens of a stream: 20 a second, as a small model on a CPU."""
WORKERS = 2


class Turn(msgspec.Struct, frozen=True):
    """One repetition; seconds and bytes."""

    alone: float
    """p99 of the pause between two arrivals."""
    beside: float
    memory: int
    """The router's, at most, while the slow ones were there."""
    broken: int
    """Slow ones whose connection the router has ended."""


class SlowReaders:
    """Clients that ask for a long answer and take a byte of it a second."""

    def __init__(self, target: Target, count: int, tokens: int) -> None:
        self._target = target
        self._request = _request(target, tokens)
        self._count = count
        self.broken = 0

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[None]:
        """Have them meanwhile."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._read()) for _ in range(self._count)]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            connection.setblocking(False)
            async with asyncio.timeout(10):
                await loop.sock_connect(connection, (self._target.host, self._target.port))
                await loop.sock_sendall(connection, self._request)
            while True:
                try:
                    if not await loop.sock_recv(connection, 1):
                        break
                except ConnectionError:
                    break
                await asyncio.sleep(1)
        self.broken += 1


def _request(target: Target, tokens: int) -> bytes:
    body: dict[str, object] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Say something about rivers."}],
        "max_tokens": tokens,
        "stream": True,
    }
    return target.post("/v1/chat/completions", body)


async def _hold(target: Target, streams: int, tokens: int) -> Result:
    result = await held_streams(
        target, _request(target, tokens), streams=streams, ramp=1.0, timeout=300
    )
    if result.errors:
        raise SystemExit(f"normal streams failed: {result.errors}")
    return result


async def measure(normal: int, slow: int, seconds: float, reps: int) -> list[Turn]:
    """Take `reps` turns."""
    tokens = int(seconds * 1000 / INTERVAL_MS)
    turns: list[Turn] = []
    async with Stack(workers=WORKERS) as stack:
        target = Target(f"http://127.0.0.1:{await stack.router('router-1')}")
        for number in range(1, WORKERS + 1):
            await stack.token_worker(
                f"worker-{number}", f"--model={MODEL}", f"--interval-ms={INTERVAL_MS}"
            )
        await stack.wait_model("router-1", "worker-1", MODEL)
        await asyncio.sleep(1.0)
        await _hold(target, normal, 20)
        for turn in range(reps):
            print(f"turn {turn + 1} of {reps}", file=sys.stderr, flush=True)
            alone = await _hold(target, normal, tokens)
            readers = SlowReaders(target, slow, 20 * tokens)
            most = 0

            async def watch() -> None:
                nonlocal most
                while True:
                    most = max(most, cost_of(stack.pids["router-1"]).rss)
                    await asyncio.sleep(0.5)

            async with readers.reading(), asyncio.TaskGroup() as group:
                watching = group.create_task(watch())
                # Their buffers must be full before they count.
                await asyncio.sleep(seconds)
                beside = await _hold(target, normal, tokens)
                watching.cancel()
            turns.append(
                Turn(
                    percentile(alone.gaps, 0.99),
                    percentile(beside.gaps, 0.99),
                    most,
                    readers.broken,
                )
            )
    return turns


def report(turns: list[Turn], normal: int, slow: int) -> str:
    """Write the table."""
    rows = [
        (
            f"pause between tokens, ms p99, {normal} streams alone",
            median_and_range([turn.alone * 1e3 for turn in turns]),
        ),
        (
            f"the same beside {slow} slow readers",
            median_and_range([turn.beside * 1e3 for turn in turns]),
        ),
        ("ratio", median_and_range([turn.beside / turn.alone for turn in turns])),
        ("router RSS, MB, at most", median_and_range([turn.memory / 1e6 for turn in turns])),
        (
            "slow readers that the router has sent away",
            f"{statistics.median(turn.broken for turn in turns):g}",
        ),
    ]
    return markdown(("figure", "median [range]"), rows)


app = cyclopts.App(help=__doc__)


@app.default
def main(*, normal: int = 50, slow: int = 200, seconds: float = 15.0, reps: int = 5) -> None:
    """Print what slow readers cost the others.

    Args:
        normal: clients that read as tokens come
        slow: clients that read a byte a second
        seconds: that the normal ones' streams last
        reps: repetitions, of which the median is shown
    """
    if normal < 1 or slow < 1 or seconds < 2 or reps < 1:
        raise SystemExit("--normal, --slow and --reps must be at least 1, --seconds at least 2")
    raise_open_files(4 * (normal + slow) + 256)
    print(report(uvloop.run(measure(normal, slow, seconds, reps)), normal, slow))


if __name__ == "__main__":
    app()
