"""A model in two stages against the same model in one process, on the same cores.

Engine processes alone, as their agents would drive them: no router, no HTTP. Each stage is pinned
to a core and has one thread; the whole model runs on one core, and on both with two threads. Layers
are dealt by the planner's rule, so that both stages read about as many bytes for a token; then once
more by how long a step of each stage took. The systems take turns within each repetition; those
that are not asked are idle. The bound is what the two stages compute unconnected, fed with made-up
activations and with caches as long as the streams': of the slower one, or of both together where a
single stream uses them in turn.
"""

import asyncio
import os
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated, Any

import cyclopts
import uvloop

from loadtests.engine_driver import EngineDriver
from loadtests.figures import markdown, median_and_range
from loadtests.peers.rpc import RPC, rate_over_rpc, rpc_halves
from loadtests.rings import (
    CONTEXT,
    Target,
    model_file,
    pin,
    prompt_tokens,
    rate_of,
    report,
    ring_of,
    stage_files,
)
from loadtests.stack import Stack
from shared.model_shape import ModelShape, Scales, Size
from shared.partition import Host, Stage, deal
from worker.shape import read_shape

SYSTEMS = ("one core", "both cores", "two stages")
BOUND_SECONDS = 1.0
WORKERS = ("worker-1", "worker-2")

app = cyclopts.App(help=__doc__, version_flags=[])


class Bound:
    """The two stages' processes, unconnected.

    Args:
        first: tokens of a stream at its first decode step.
        last: at its last.
    """

    def __init__(self, first: int, last: int) -> None:
        self._span = f"{first} {last}"
        self._stages: list[asyncio.subprocess.Process] = []

    async def start(self, paths: Sequence[Path], slots: int) -> None:
        """Load them, each on a core of its own."""
        for core, path in enumerate(paths):
            head = ("--head",) if path == paths[-1] else ()
            stage = await asyncio.create_subprocess_exec(
                *("taskset", "-c", str(core), sys.executable, "-m", "loadtests.stage_bound"),
                *(str(path), "--slots", str(slots), "--context", str(CONTEXT), *head),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
            )
            self._stages.append(stage)
            await self._line(stage)

    async def stop(self) -> None:
        """End them."""
        for stage in self._stages:
            if stage.stdin is not None:
                stage.stdin.close()
            await stage.wait()
        self._stages.clear()

    async def steps(self, rows: int) -> list[float]:
        """Seconds of a step of so many rows, of each stage, both at work."""
        for stage in self._stages:
            if stage.stdin is not None:
                stage.stdin.write(f"{rows} {BOUND_SECONDS} {self._span}\n".encode())
        return [float(await self._line(stage)) for stage in self._stages]

    async def rate(self, streams: int) -> float:
        """Tokens a second of so many streams."""
        if streams == 1:
            return 1 / sum(await self.steps(1))
        rows = -(-streams // len(self._stages))
        return rows / max(await self.steps(rows))

    @staticmethod
    async def _line(stage: asyncio.subprocess.Process) -> str:
        line = await stage.stdout.readline() if stage.stdout is not None else b""
        if not line:
            raise RuntimeError("a stage of the bound has ended")
        return line.decode().strip()


def _dealt(shape: ModelShape, slots: int, speeds: Sequence[float]) -> tuple[Stage, ...]:
    hosts = [Host(name, 1 << 40, speed=speed) for name, speed in zip(WORKERS, speeds, strict=True)]
    stages = deal(Scales(shape, Size(CONTEXT * slots, 64)), hosts)
    assert stages is not None
    return stages


async def _balanced(
    model: Path, folder: Path, slots: int, span: tuple[int, int]
) -> tuple[tuple[Stage, ...], list[Path]]:
    """Deal the layers so that a step takes both stages as long.

    What a stage reads says nothing of what its attention and its logits compute; so the first deal
    is measured, and what a stage took for its share of the bytes is its speed in the next one. Of
    those that were measured the best is taken.
    """
    shape = read_shape(model)
    stages = _dealt(shape, slots, (1.0, 1.0))
    best: tuple[float, tuple[Stage, ...]] | None = None
    for _ in range(3):
        bound = Bound(*span)
        try:
            await bound.start(stage_files(model, folder, stages), slots)
            took = [await bound.steps(max(1, slots // 2)) for _ in range(3)]
        finally:
            await bound.stop()
        means = [sum(one) / len(took) for one in zip(*took, strict=True)]
        parts = [
            f"layers {stage.start}-{stage.stop - 1}{'+head' if stage.head else ''}: "
            f"{1000 * mean:.2f} ms"
            for stage, mean in zip(stages, means, strict=True)
        ]
        sys.stderr.write(f"{'; '.join(parts)}\n")
        best = min(best or (max(means), stages), (max(means), stages), key=lambda one: one[0])
        speeds = [stage.share / mean for stage, mean in zip(stages, means, strict=True)]
        again = _dealt(shape, slots, speeds)
        if [stage.stop for stage in again] == [stage.stop for stage in stages]:
            break
        stages = again
    assert best is not None
    return best[1], stage_files(model, folder, best[1])


async def measure(
    target: Target,
    streams: tuple[int, ...],
    tokens: int,
    reps: int,
    *,
    half: bool,
    rpc: bool,
) -> str:
    """Run all and return the table."""
    options: dict[str, Any] = {"slots": max(streams), "context": CONTEXT, "step_tokens": 256}
    rates: dict[tuple[str, int], list[float]] = {}
    bounds: dict[int, list[float]] = {}
    async with Stack(workers=len(WORKERS)) as stack, AsyncExitStack() as owner:
        model = model_file(target, stack.folder)
        whole = [
            EngineDriver(str(model), threads=threads, speculation="off", **options)
            for threads in (1, 2)
        ]
        async with asyncio.TaskGroup() as group:
            for engine in whole:
                owner.push_async_callback(engine.stop)
                group.create_task(engine.start())
        prompt = await prompt_tokens(whole[0])
        span = (prompt, prompt + tokens)
        stages, paths = await _balanced(model, stack.folder / "stages", max(streams), span)
        ring = ring_of(model, paths, WORKERS, stack.url, speculation="off", half=half, **options)
        bound = Bound(*span)
        owner.push_async_callback(bound.stop)
        await bound.start(paths, max(streams))
        async with asyncio.TaskGroup() as group:
            for engine in ring:
                owner.push_async_callback(engine.stop)
                group.create_task(engine.start())
        for engine, cores in zip((*whole, *ring), ({0}, {0, 1}, {0}, {1}), strict=True):
            pin(engine, cores)
        systems = dict(zip(SYSTEMS, (*whole, ring[-1]), strict=True))
        behind = None
        if rpc:
            halves = rpc_halves(
                model, layers=stages[-1].stop // 2, slots=max(streams), context=CONTEXT
            )
            behind = await owner.enter_async_context(halves)
        for rep in range(reps):
            for count in streams:
                for name, engine in systems.items():
                    rate = await rate_of(engine, count, tokens, 1000 * rep)
                    rates.setdefault((name, count), []).append(rate)
                    sys.stderr.write(f"{rep + 1}/{reps}: {count} at once, {name}: {rate:.1f}\n")
                if behind is not None:
                    rate = await rate_over_rpc(behind, count, tokens, 1000 * rep, report)
                    rates.setdefault((RPC, count), []).append(rate)
                    sys.stderr.write(f"{rep + 1}/{reps}: {count} at once, RPC: {rate:.1f}\n")
                bounds.setdefault(count, []).append(await bound.rate(count))
    cuts = ", ".join(f"{s.start}-{s.stop - 1}{'+head' if s.head else ''}" for s in stages)
    sys.stderr.write(f"layers {cuts}\n")
    rows = []
    for count in streams:
        alone, both, split = (rates[name, count] for name in SYSTEMS)
        ratios = [a / b for a, b in zip(split, alone, strict=True)]
        beside = [a / b for a, b in zip(split, both, strict=True)]
        most = bounds[count]
        of_bound = [a / b for a, b in zip(split, most, strict=True)]
        columns = [alone, both, split, most, ratios, beside, of_bound]
        if rpc:
            over = rates[RPC, count]
            columns += [over, [a / b for a, b in zip(split, over, strict=True)]]
        rows.append((str(count), *map(median_and_range, columns)))
    head = ("at once", *SYSTEMS, "bound", "stages / one core", "/ both cores", "/ bound")
    return markdown((*head, "RPC", "stages / RPC") if rpc else head, rows)


@app.default
def main(
    *,
    target: Target = "Q4_0",
    at_once: tuple[int, ...] = (1, 2, 8, 16, 32),
    tokens: int = 64,
    reps: int = 5,
    half: Annotated[bool, cyclopts.Parameter(negative=())] = False,
    rpc: Annotated[bool, cyclopts.Parameter(negative=())] = False,
) -> None:
    """Print tokens a second.

    Args:
        target: format of SmolLM2's weights
        at_once: streams; may be given several times
        tokens: of each answer
        reps: repetitions, of which the median is shown
        half: send activations with 16 bits a number, not 32
        rpc: llama.cpp's RPC as well, half of the layers on each core; `make peers` builds it
    """
    if len(os.sched_getaffinity(0)) < 2:
        raise SystemExit("two cores are needed, one a stage")
    print(uvloop.run(measure(target, at_once, tokens, reps, half=half, rpc=rpc)))


if __name__ == "__main__":
    app()
