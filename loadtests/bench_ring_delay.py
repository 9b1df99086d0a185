"""Stages far from each other: tokens a second as the way between two of them gets longer.

Three stages of SmolLM2 as engine processes, the connection of each to NATS through a proxy that
holds every byte back, so that a message from one stage to the next takes `--delay` longer. Without
drafts and with a draft model at the head, in turns; for each delay they are started anew, as
stages that are so far from each other would be. Of a round, in which each stream gets a
token, or those of its draft that are accepted, the bound is what it cannot be shorter than: the
delays of all its hops, and what the round takes without any.
"""

import asyncio
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import cyclopts
import uvloop

from loadtests.engine_driver import EngineDriver
from loadtests.figures import markdown, median_and_range
from loadtests.rings import CONTEXT, Target, model_file, rate_of, ring_of, stage_files
from loadtests.speculation_corpora import Corpus, prompts
from loadtests.stack import Stack
from loadtests.wire_proxy import WireProxy
from shared.model_shape import Scales, Size
from shared.partition import Host, deal
from worker.shape import read_shape

WORKERS = ("worker-1", "worker-2", "worker-3")
HOPS = len(WORKERS)
"""From the head round to the head: one to each of the others, and back."""
MODES = ("without drafts", "with drafts")

app = cyclopts.App(help=__doc__, version_flags=[])


def _files(model: Path, folder: Path, slots: int) -> list[Path]:
    shape = read_shape(model)
    stages = deal(
        Scales(shape, Size(CONTEXT * slots, 64)), [Host(name, 1 << 40) for name in WORKERS]
    )
    assert stages is not None
    return stage_files(model, folder, stages)


async def measure(
    target: Target,
    draft: Target,
    delays: tuple[float, ...],
    streams: tuple[int, ...],
    tokens: int,
    reps: int,
    corpus: Corpus,
) -> str:
    """Run all and return the table."""
    asked = [prompt.messages[-1].content for prompt in prompts(corpus, 12)]
    texts = [asked[n % len(asked)] for n in range(max(streams) * reps)]
    options: dict[str, Any] = {"slots": max(streams), "context": CONTEXT, "step_tokens": 256}
    rates: dict[tuple[str, float, int], list[float]] = {}
    trips: dict[tuple[str, float, int], list[float]] = {}
    async with Stack(workers=len(WORKERS)) as stack, AsyncExitStack() as owner:
        model = model_file(target, stack.folder)
        drafting = model_file(draft, stack.folder)
        proxy = WireProxy()
        await owner.enter_async_context(proxy.running())
        paths = _files(model, stack.folder / "stages", max(streams))
        for delay in delays:
            # What the proxy holds back is half of its round trip, twice a hop.
            proxy.rtt = delay
            async with AsyncExitStack() as rings:
                heads = {
                    mode: await _ring(
                        rings,
                        model,
                        paths,
                        lambda worker: proxy.url(stack.url(worker)),
                        f"delay-{1000 * delay:g}-{number}".replace(".", "-"),
                        draft=str(drafting) if mode == "with drafts" else "",
                        speculation="auto" if mode == "with drafts" else "off",
                        **options,
                    )
                    for number, mode in enumerate(MODES)
                }
                for rep in range(reps):
                    for count in streams:
                        for mode, head in heads.items():
                            key = mode, delay, count
                            before = head.stats
                            rate = await rate_of(
                                head, count, tokens, count * rep, texts.__getitem__
                            )
                            rates.setdefault(key, []).append(rate)
                            trips.setdefault(key, []).append(
                                _per_trip(before, head, count * tokens)
                            )
                            sys.stderr.write(
                                f"{1000 * delay:g} ms, {rep + 1}/{reps}, {count} at once, {mode}: "
                                f"{rate:.1f} tok/s\n"
                            )
    rows = []
    for mode in MODES:
        for count in streams:
            near = rates[mode, delays[0], count]
            for delay in delays:
                key = mode, delay, count
                rows.append(_row(mode, count, delay, rates[key], near, trips[key]))
    titles = ("drafts", "at once", "delay", "tok/s", "of 0 ms", "tokens a trip", "bound", "of it")
    return markdown(titles, rows)


async def _ring(
    owner: AsyncExitStack,
    model: Path,
    paths: list[Path],
    url: Callable[[str], str],
    group: str,
    **options: Any,
) -> EngineDriver:
    """Start a ring, to be stopped by its owner, and return the head's engine."""
    # What was asked before is asked again: the answer is not to be found in a memory.
    ring = ring_of(model, paths, WORKERS, url, group=group, ngram_memory=0, **options)
    async with asyncio.TaskGroup() as starting:
        for engine in ring:
            owner.push_async_callback(engine.stop)
            starting.create_task(engine.start())
    return ring[-1]


def _per_trip(before: object, head: EngineDriver, tokens: int) -> float:
    """Tokens of a stream a round, from what was accepted."""
    accepted = head.stats.accepted if head.stats is not None else 0
    was = getattr(before, "accepted", 0)
    rounds = tokens - (accepted - was)
    return tokens / max(1, rounds)


def _row(
    mode: str,
    count: int,
    delay: float,
    rates: list[float],
    near: list[float],
    trips: list[float],
) -> tuple[str, ...]:
    bounds = []
    for trip, fast in zip(trips, near, strict=True):
        round_seconds = HOPS * delay + count * trip / fast
        bounds.append(min(fast, count * trip / round_seconds))
    return (
        mode,
        str(count),
        f"{1000 * delay:g} ms",
        median_and_range(rates),
        median_and_range([a / b for a, b in zip(rates, near, strict=True)]),
        median_and_range(trips),
        median_and_range(bounds),
        median_and_range([a / b for a, b in zip(rates, bounds, strict=True)]),
    )


@app.default
def main(
    *,
    target: Target = "F32",
    draft: Target = "Q4_0",
    delay: tuple[float, ...] = (0, 5, 10, 20, 40),
    at_once: tuple[int, ...] = (1, 8),
    tokens: int = 48,
    reps: int = 5,
    corpus: Corpus = "code",
) -> None:
    """Print tokens a second, and what is left of them, by the delay of a hop.

    Args:
        target: format of SmolLM2's weights
        draft: format of the draft, which is SmolLM2 too
        delay: milliseconds one way between two stages, the first one 0; may be given several times
        at_once: streams; may be given several times
        tokens: of each answer
        reps: repetitions, of which the median is shown
        corpus: what is asked for
    """
    if delay[0] != 0:
        raise SystemExit("--delay: the first one must be 0, with which the others are compared")
    seconds = tuple(one / 1000 for one in delay)
    print(uvloop.run(measure(target, draft, seconds, at_once, tokens, reps, corpus)))


if __name__ == "__main__":
    app()
