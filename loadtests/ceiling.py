"""llama.cpp's own ceiling: a bare loop around `llama_decode`, in a process of its own.

    python -m loadtests.ceiling MODEL.gguf --threads N

Reads lines: `streams rep` begins a load, `seconds` goes on with it for so long. Answers each with a
line, tokens and seconds. Arrays filled, one call a step, argmax, nothing else; the streams lie in
consecutive slots, the best case for llama.cpp. It has its own process, and the loop the main
thread, because llama.cpp's threads belong to the one that calls it: beside a busy interpreter the
loop would be slower than the engine.
"""

import argparse
import asyncio
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from loadtests.engine_driver import default_gpu_layers
from worker.engine.batch import Batch
from worker.engine.llama import Context, Model, silence

__all__ = ("CONTEXT", "MOST_STREAMS", "Ceiling", "lengths", "prompt")

CONTEXT = 512
PROMPT = 16
MOST_STREAMS = 32


def lengths(stream: int, rep: int) -> Iterator[int]:
    """Output lengths of one stream's requests: 64 to 192 tokens, 128 in the mean."""
    rng = random.Random(1000 * rep + stream)
    yield rng.randrange(1, 192)  # the first are cut so that streams do not end together
    while True:
        yield rng.randrange(64, 193)


def prompt(rng: random.Random) -> list[int]:
    """A prompt of random tokens, which shares nothing with another."""
    return [rng.randrange(1000, 40000) for _ in range(PROMPT)]


class _Loop:
    """One context for all stream counts."""

    def __init__(self, path: str, threads: int) -> None:
        self._context = Context(
            Model(path, gpu_layers=default_gpu_layers()),
            slots=MOST_STREAMS,
            context=CONTEXT,
            step_tokens=512,
            threads=threads,
            prefill_threads=threads,
        )
        self._batch = Batch(512)

    def load(self, streams: int, rep: int) -> Iterator[int]:
        """Start the streams, then run for ever: the tokens of a step with all of them, each time.

        Raises:
            RuntimeError: llama.cpp failed.
        """
        rng = random.Random(rep)
        for slot in range(MOST_STREAMS):
            self._context.forget(slot)
        plans = [lengths(s, rep) for s in range(streams)]
        left = np.zeros(streams, dtype=np.int64)
        position = np.zeros(streams, dtype=np.int32)
        token = np.zeros(streams, dtype=np.int32)
        slots = np.arange(streams, dtype=np.int32)
        started = 0
        while True:
            # One joins a step, as in the engine, so that both windows find streams equally long.
            started = min(started + 1, streams)
            count = started
            for s in np.flatnonzero(left[:started] <= 0):
                token[s] = self._prefill(int(s), prompt(rng))
                left[s], position[s] = next(plans[s]) - 1, PROMPT
                count += 1
            token[:started] = self._step(token[:started], position[:started], slots[:started])
            position[:started] += 1
            left[:started] -= 1
            if started == streams:
                yield count

    def _prefill(self, slot: int, tokens: list[int]) -> int:
        batch = self._batch
        self._context.forget(slot)
        batch.token[:PROMPT] = tokens
        batch.position[:PROMPT] = np.arange(PROMPT)
        batch.slot[:PROMPT] = slot
        batch.output[:PROMPT] = 0
        batch.output[PROMPT - 1] = 1
        self._decode(PROMPT)
        return int(self._context.logits(1)[0].argmax())

    def _step(
        self, token: NDArray[np.int32], position: NDArray[np.int32], slots: NDArray[np.int32]
    ) -> NDArray[np.int32]:
        batch, streams = self._batch, len(slots)
        batch.token[:streams] = token
        batch.position[:streams] = position
        batch.slot[:streams] = slots
        batch.output[:streams] = 1
        self._decode(streams)
        best: NDArray[np.int64] = self._context.logits(streams).argmax(axis=1)
        return best.astype(np.int32)

    def _decode(self, rows: int) -> None:
        code = self._context.decode(self._batch, rows)
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code} for {rows} rows")


class Ceiling:
    """The process, seen from the benchmark; a context manager that ends it."""

    def __init__(self, path: Path, threads: int) -> None:
        self._command = [
            sys.executable,
            "-m",
            "loadtests.ceiling",
            str(path),
            f"--threads={threads}",
        ]
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        await self._line(120)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        assert self._process is not None
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    async def begin(self, streams: int, rep: int) -> None:
        """Start a load of so many streams; what ran before is dropped.

        Raises:
            RuntimeError: the process ended.
            TimeoutError: it did not answer.
        """
        await self._ask(f"{streams} {rep}", 60)

    async def window(self, seconds: float) -> tuple[int, float]:
        """Go on with the load for about `seconds`: its tokens, and the seconds they took.

        Raises:
            RuntimeError: the process ended.
            TimeoutError: it did not answer.
        """
        tokens, took = (await self._ask(f"{seconds}", seconds + 60)).split()
        return int(tokens), float(took)

    async def _ask(self, line: str, timeout: float) -> bytes:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())
        return await self._line(timeout)

    async def _line(self, timeout: float) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        async with asyncio.timeout(timeout):
            line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError("the ceiling's process ended")
        return line


def main() -> None:
    """Answer until the benchmark closes its end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    silence()
    loop = _Loop(args.model, args.threads)
    print("ready", flush=True)
    load: Iterator[int] = iter(())
    for line in sys.stdin:
        words = line.split()
        tokens, began = 0, time.perf_counter()
        if len(words) == 2:
            load = loop.load(int(words[0]), int(words[1]))
            next(load)
        else:
            while time.perf_counter() - began < float(words[0]):
                tokens += next(load)
        print(tokens, time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main()
