"""Many requests at one moment, to the engine alone: how soon each begins, and what others wait.

Prompts always wait here while the number of streams grows, which is what the pieces of prompts in a
step are hardest to size for. With `--against` the engine of another checkout takes turns.
"""

import asyncio
import math
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import cyclopts
import msgspec
import uvloop
from cyclopts import Parameter
from cyclopts.types import ExistingDirectory, ExistingFile
from cyclopts.validators import Number

from loadtests.engine_driver import EngineDied, EngineDriver, new_attempt
from loadtests.figures import markdown, median_and_range, percentile
from shared.protocol import ChatInput, Delta, Generate, Message, Sampling
from worker.engine_process import ENGINE_COMMAND

_HEAD = ("engine", "begun", "half have begun after, s", "all, s", "pause p50, s", "p99, s", "tok/s")


class Rush(msgspec.Struct, frozen=True):
    """What became of a crowd within its time."""

    begun: int
    half: float
    """Seconds until half of all had their first token; infinite: not within the time."""
    all: float
    pauses: tuple[float, float]
    """Seconds between a stream's tokens, p50 and p99."""
    rate: float
    """Tokens a second, of all streams."""


def _request(number: int, tokens: int, seconds: float) -> Generate:
    text = f"Number {number}: tell me of the sea, of its {number} waves and the ships on it."
    return Generate(
        id="crowd",
        attempt=new_attempt(),
        model="bench",
        input=ChatInput((Message("user", text),)),
        sampling=Sampling(seed=number, temperature=0.8, ignore_eos=True),
        deadline=time.time() + 2 * seconds,
        max_tokens=tokens,
    )


async def rush(engine: EngineDriver, streams: int, *, tokens: int, seconds: float) -> Rush:
    """Ask for so many answers at once, and look at them for so long."""
    began = time.perf_counter()
    firsts: list[float] = []
    pauses: list[float] = []
    counted = 0

    async def one(number: int) -> None:
        """Read an answer to its end."""
        nonlocal counted
        last = 0.0
        async for frame in engine.submit(_request(number, tokens, seconds)):
            if not isinstance(frame, Delta):
                continue
            now = time.perf_counter() - began
            if last:
                pauses.append(now - last)
            else:
                firsts.append(now)
            last = now
            counted += len(frame.tokens)

    with suppress(TimeoutError):
        async with asyncio.timeout(seconds), asyncio.TaskGroup() as group:
            for number in range(streams):
                group.create_task(one(number))
    taken = time.perf_counter() - began
    begun = len(firsts)
    firsts += [math.inf] * (streams - begun)
    firsts.sort()
    pauses = pauses or [math.inf]
    return Rush(
        begun=begun,
        half=firsts[(streams - 1) // 2],
        all=firsts[-1],
        pauses=(percentile(pauses, 0.5), percentile(pauses, 0.99)),
        rate=counted / taken,
    )


def _row(name: str, rushes: list[Rush]) -> list[str]:
    figures: list[list[float]] = [
        [one.begun for one in rushes],
        [one.half for one in rushes],
        [one.all for one in rushes],
        [one.pauses[0] for one in rushes],
        [one.pauses[1] for one in rushes],
        [one.rate for one in rushes],
    ]
    return [name, *map(median_and_range, figures)]


async def _run(
    model: Path,
    against: Path | None,
    *,
    streams: int,
    tokens: int,
    seconds: float,
    reps: int,
    threads: int,
) -> list[list[str]]:
    commands: dict[str, tuple[str, ...]] = {"this one": ENGINE_COMMAND}
    if against is not None:
        commands[against.name] = (
            "env",
            "-C",
            str(against),
            f"PYTHONPATH={against}",
            *ENGINE_COMMAND,
        )
    found: dict[str, list[Rush]] = {name: [] for name in commands}
    for rep in range(reps):
        for name in sorted(commands, reverse=bool(rep % 2)):
            engine = EngineDriver(
                str(model), slots=streams, context=512, threads=threads, command=commands[name]
            )
            await engine.start()
            try:
                found[name].append(await rush(engine, streams, tokens=tokens, seconds=seconds))
            finally:
                await engine.stop()
            print(name, found[name][-1], file=sys.stderr, flush=True)
    return [_row(name, rushes) for name, rushes in found.items()]


def main(
    model: ExistingFile,
    *,
    streams: Annotated[int, Parameter(validator=Number(gte=1))] = 200,
    tokens: int = 412,
    seconds: float = 60.0,
    reps: Annotated[int, Parameter(validator=Number(gte=1))] = 5,
    threads: int = 2,
    against: ExistingDirectory | None = None,
) -> None:
    """Print the table.

    Parameters
    ----------
    model
        A GGUF file.
    streams
        Requests at once, each with a slot.
    tokens
        Of each answer.
    seconds
        After which all that still run are cancelled.
    reps
        Repetitions, of which the median is shown.
    threads
        Of the engine.
    against
        Folder of another checkout, whose engine takes turns with this one's.
    """
    other = against.resolve() if against is not None else None
    running = _run(
        model.resolve(),
        other,
        streams=streams,
        tokens=tokens,
        seconds=seconds,
        reps=reps,
        threads=threads,
    )
    try:
        rows = uvloop.run(running)
    except EngineDied as error:
        sys.exit(f"bench_crowd: {error}")
    print(markdown(_HEAD, rows))


if __name__ == "__main__":
    cyclopts.run(main)
