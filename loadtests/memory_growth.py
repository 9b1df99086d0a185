"""What processes hold, and whether that grows: samples, the line through them, the verdict.

The kernel is asked for memory, open files and sockets, and threads. Growth is the slope of a line
fitted to the samples, times the requests since. nats-server's is what it holds at most, against the
most that it held while a bucket was written to before: JetStream keeps the block of a file that it
writes to, which at a fleet's pace takes hours to fill.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec
import psutil

from loadtests.figures import markdown

__all__ = (
    "Growth",
    "Memory",
    "Open",
    "Sample",
    "growths",
    "memory_of",
    "open_of",
    "report",
    "shown",
    "spark",
    "too_short",
)

JUDGED = ("router", "agent", "engine", "nats")
Field = Literal["rss", "anonymous", "descriptors", "threads", "tasks"]
BYTES: tuple[Field, ...] = ("rss", "anonymous")
COUNTS: tuple[Field, ...] = ("descriptors", "threads", "tasks")
SHARE = 0.03
LEAST_SAMPLES = 3
"""Through how many a line is fitted at least."""
LEAST = 5e6
"""Bytes of growth that are never held against a process; else `SHARE` of what it holds."""
LEAST_COUNT = 4.0
"""Open files, threads and tasks that come and go."""
_FIELDS = {"Rss:": "rss", "Pss:": "pss", "Anonymous:": "anonymous"}
_PRIVATE = ("Private_Clean:", "Private_Dirty:")


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


def open_of(pid: int, tasks: int = 0) -> Open:
    """Ask the kernel what a process has open; raises psutil.NoSuchProcess."""
    process = psutil.Process(pid)
    return Open(process.num_fds(), process.num_threads(), tasks)


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


def shown(one: Open) -> str:
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
        heads, [(f"{s.requests:,}", *(shown(s.open[name]) for name in names)) for s in chosen]
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
