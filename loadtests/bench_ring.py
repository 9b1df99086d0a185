"""A model in two stages against the same model in one process, on the same cores.

Engine processes alone, as their agents would drive them: no router, no HTTP. Each stage is pinned
to a core and has one thread; the whole model runs on one core, and on both with two threads. Layers
are dealt by the planner's rule, so that both stages read about as many bytes for a token. The
systems take turns within each repetition; those that are not asked are idle.
"""

import asyncio
import os
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated, Literal

import cyclopts
import msgspec
import uvloop

from loadtests.engine_driver import EngineDriver, new_attempt
from loadtests.figures import markdown, median_and_range
from loadtests.stack import Stack, smollm2, smollm2_f32, smollm2_q4_0
from shared.broker_config import ring_url, ring_user
from shared.model_shape import Scales, Size
from shared.partition import Host, deal
from shared.protocol import ChatInput, Delta, Generate, Message, Sampling
from worker.cut_file import make_stage
from worker.link import RingPlace
from worker.model_bytes import FileBytes
from worker.shape import read_shape
from worker.stage_cut import Wanted

Target = Literal["F32", "Q4_0", "Q4_1"]
SYSTEMS = ("one core", "both cores", "two stages")
WORKERS = ("worker-1", "worker-2")
CONTEXT = 512
_FILES = {"F32": smollm2_f32, "Q4_0": smollm2_q4_0, "Q4_1": lambda folder: smollm2()}

app = cyclopts.App(help=__doc__, version_flags=[])


def _asked(number: int, tokens: int) -> Generate:
    text = f"Write a long report about case {number} of the harbour."
    return Generate(
        id="bench",
        attempt=new_attempt(),
        model="bench",
        input=ChatInput((Message("user", text),)),
        sampling=Sampling(seed=1, temperature=0, ignore_eos=True),
        deadline=time.time() + 600,
        max_tokens=tokens,
    )


async def _rate(engine: EngineDriver, streams: int, tokens: int, first: int) -> float:
    """Tokens a second while all streams run: from the last one's first to the first one's last."""
    begun: list[float] = []
    ended: list[float] = []
    came: list[float] = []

    async def one(number: int) -> None:
        mine = 0
        async for frame in engine.submit(_asked(number, tokens)):
            if isinstance(frame, Delta) and frame.tokens:
                now = time.perf_counter()
                if not mine:
                    begun.append(now)
                mine += len(frame.tokens)
                came.extend([now] * len(frame.tokens))
        ended.append(time.perf_counter())

    async with asyncio.TaskGroup() as group:
        for number in range(streams):
            group.create_task(one(first + number))
    start, stop = max(begun), min(ended)
    return sum(start < at <= stop for at in came) / (stop - start)


def _pin(engine: EngineDriver, cores: set[int]) -> None:
    for task in Path(f"/proc/{engine.pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), cores)


async def _ring(
    model: Path, stack: Stack, options: dict[str, int], *, half: bool
) -> list[EngineDriver]:
    shape = read_shape(model)
    stages = deal(
        Scales(shape, Size(CONTEXT * options["slots"], 64)),
        [Host(name, 1 << 40) for name in WORKERS],
    )
    assert stages is not None
    engines: list[EngineDriver] = []
    for index, stage in enumerate(stages):
        wanted = Wanted(stage.start, stage.stop, head=stage.head)
        folder = stack.folder / "stages"
        made = make_stage(FileBytes(model), wanted, folder, progress=lambda *_: None)
        engine = EngineDriver(str(made.path), threads=1, speculation="off", **options)
        place = RingPlace(
            group=f"bench-{model.stem.rpartition('.')[2]}",
            workers=WORKERS,
            index=index,
            nats=ring_url(stack.url(stage.host)),
            identity=ring_user(stage.host),
            half=half,
        )
        engine.config = msgspec.structs.replace(engine.config, ring=place)
        engines.append(engine)
        sys.stderr.write(f"layers {stage.start}-{stage.stop - 1} on {stage.host}\n")
    return engines


async def measure(
    target: Target, streams: tuple[int, ...], tokens: int, reps: int, *, half: bool
) -> str:
    """Run all and return the table."""
    options = {"slots": max(streams), "context": CONTEXT, "step_tokens": 256}
    rates: dict[tuple[str, int], list[float]] = {}
    async with Stack(workers=len(WORKERS)) as stack, AsyncExitStack() as owner:
        model = _FILES[target](stack.folder)
        whole = [
            EngineDriver(str(model), threads=threads, speculation="off", **options)
            for threads in (1, 2)
        ]
        ring = await _ring(model, stack, options, half=half)
        async with asyncio.TaskGroup() as group:
            for engine in (*whole, *ring):
                owner.push_async_callback(engine.stop)
                group.create_task(engine.start())
        for engine, cores in zip((*whole, *ring), ({0}, {0, 1}, {0}, {1}), strict=True):
            _pin(engine, cores)
        systems = dict(zip(SYSTEMS, (*whole, ring[-1]), strict=True))
        for rep in range(reps):
            for count in streams:
                for name, engine in systems.items():
                    rate = await _rate(engine, count, tokens, 1000 * rep)
                    rates.setdefault((name, count), []).append(rate)
                    sys.stderr.write(f"{rep + 1}/{reps}: {count} at once, {name}: {rate:.1f}\n")
    rows = []
    for count in streams:
        alone, both, split = (rates[name, count] for name in SYSTEMS)
        ratios = [a / b for a, b in zip(split, alone, strict=True)]
        beside = [a / b for a, b in zip(split, both, strict=True)]
        rows.append((str(count), *map(median_and_range, (alone, both, split, ratios, beside))))
    head = ("at once", *SYSTEMS, "stages / one core", "stages / both cores")
    return markdown(head, rows)


@app.default
def main(
    *,
    target: Target = "Q4_0",
    at_once: tuple[int, ...] = (1, 2, 8, 16, 32),
    tokens: int = 64,
    reps: int = 5,
    half: Annotated[bool, cyclopts.Parameter(negative="--full")] = True,
) -> None:
    """Print tokens a second.

    Args:
        target: format of SmolLM2's weights
        at_once: streams; may be given several times
        tokens: of each answer
        reps: repetitions, of which the median is shown
        half: send activations with 16 bits a number; --full: with 32
    """
    if len(os.sched_getaffinity(0)) < 2:
        raise SystemExit("two cores are needed, one a stage")
    print(uvloop.run(measure(target, at_once, tokens, reps, half=half)))


if __name__ == "__main__":
    app()
