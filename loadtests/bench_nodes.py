"""One node, a pipeline of two, and expert shards on three, each node with the same CPU share.

What mesh-llm's authors claimed of their system in three figures: 68 tokens/s of a node alone, 85 of
a pipeline over two, 112 of expert shards on three. Here a node is an engine process with one thread
that the kernel gives a share of a core; all nodes have the same one, and only those that are asked
are at work. The model is a mixture made of SmolLM2 (`upcycled.py`); a node alone and the pipeline
have all of it, and a shard the experts that the planner's rule gives it. Streams are dealt to the
shards in turn, as conversations are.
"""

import asyncio
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import cyclopts
import uvloop

from loadtests.bench_shards import scored, shards_of
from loadtests.cpu_share import NoShares, cpu_share
from loadtests.engine_driver import EngineDriver
from loadtests.figures import markdown, median_and_range
from loadtests.rings import CONTEXT, rate_of, ring_of, stage_files
from loadtests.stack import Stack, smollm2_f32
from loadtests.upcycled import upcycle
from shared.model_shape import Scales, Size
from shared.partition import Host, deal
from worker.engine.llama import silence
from worker.shape import read_shape

SHARDS = 3
WORKERS = ("worker-1", "worker-2")
SYSTEMS = ("one node", "pipeline of 2", "shards on 3")
CLAIMED = (68, 85, 112)
OPTIONS = {"shards": SHARDS, "core": 2, "overlap": 1}
"""Of the shards: experts that all have, and how many have each of the others."""

app = cyclopts.App(help=__doc__, version_flags=[])


def halves(model: Path, folder: Path, slots: int) -> list[Path]:
    """Files of the pipeline's stages, dealt as for hosts that are alike."""
    hosts = [Host(name, 1 << 40) for name in WORKERS]
    stages = deal(Scales(read_shape(model), Size(CONTEXT * slots, 64)), hosts)
    assert stages is not None
    return stage_files(model, folder, stages)


async def measure(text: str, streams: tuple[int, ...], tokens: int, reps: int, share: float) -> str:
    """Run all and return the table."""
    rates: dict[tuple[str, int], list[float]] = {}
    async with Stack(workers=len(WORKERS)) as stack, AsyncExitStack() as owner:
        folder = stack.folder
        model = upcycle(smollm2_f32(folder), folder / "mixture.F16.gguf", noise=0.1)
        parts = shards_of(model, folder, scored(model, text, 1), OPTIONS)
        slots = max(streams)
        options: dict[str, Any] = {
            "slots": slots,
            "context": CONTEXT,
            "step_tokens": 256,
            "speculation": "off",
        }
        alone = EngineDriver(str(model), **options)
        ring = ring_of(
            model, halves(model, folder / "stages", slots), WORKERS, stack.url, **options
        )
        shards = [EngineDriver(str(path), **options) for path in parts]
        nodes = (alone, *ring, *shards)
        groups = [owner.enter_context(cpu_share(str(n), share)) for n in range(len(nodes))]
        async with asyncio.TaskGroup() as group:
            for engine in nodes:
                owner.push_async_callback(engine.stop)
                group.create_task(engine.start())
        for engine, limit in zip(nodes, groups, strict=True):
            limit.take(engine.pid)
        systems = dict(zip(SYSTEMS, ([alone], [ring[-1]], shards), strict=True))
        for rep in range(reps):
            for count in streams:
                for name, engines in systems.items():
                    asked = [len(range(n, count, len(engines))) for n in range(len(engines))]
                    several = await asyncio.gather(
                        *(
                            rate_of(engine, mine, tokens, 1000 * rep + 100 * n)
                            for n, (engine, mine) in enumerate(zip(engines, asked, strict=True))
                            if mine
                        )
                    )
                    rates.setdefault((name, count), []).append(sum(several))
                    sys.stderr.write(
                        f"{rep + 1}/{reps}: {count} at once, {name}: {sum(several):.1f}\n"
                    )
    rows = []
    for count in streams:
        alone_rates, *others = (rates[name, count] for name in SYSTEMS)
        ratios = [[a / b for a, b in zip(one, alone_rates, strict=True)] for one in others]
        shown = map(median_and_range, (alone_rates, *others, *ratios))
        rows.append((str(count), *shown))
    claimed = [f"{figure / CLAIMED[0]:.2f}" for figure in CLAIMED[1:]]
    rows.append(("claimed of mesh-llm", *map(str, CLAIMED), *claimed))
    return markdown(("at once", *SYSTEMS, "pipeline / one", "shards / one"), rows)


@app.default
def main(
    *,
    text: Path = Path("docs/failing.md"),
    at_once: tuple[int, ...] = (3, 9, 24),
    tokens: int = 48,
    reps: int = 5,
    share: float = 0.6,
) -> None:
    """Print tokens a second.

    Args:
        text: over which the experts' gate mass is measured
        at_once: streams; may be given several times
        tokens: of each answer
        reps: repetitions, of which the median is shown
        share: cores that a node may have
    """
    silence()
    words = text.read_text("utf-8")
    try:
        print(uvloop.run(measure(words, at_once, tokens, reps, share)))
    except NoShares as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    app()
