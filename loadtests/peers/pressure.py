"""Part "pressure": more and longer requests than there is room for, on our system alone.

Three sizes of requests, shuffled, from three times as many users as slots, each of whom asks again
when answered. The long ones ask for more than a slot's context holds, and are cut to it. What is
looked for: that all are answered, that no process dies, and that nobody waits much longer than
others of the same size.
"""

import random
from collections.abc import AsyncIterator, Sequence

import msgspec

from loadtests.figures import markdown, percentile
from loadtests.http_reply import Reply
from loadtests.peers.asking import chat, try_all
from loadtests.peers.systems import System
from loadtests.peers.texts import Texts, user
from loadtests.procfs import descendants

__all__ = ("PressureRow", "Size", "measure_pressure", "pressure_row", "pressure_table", "sizes")

USERS_A_SLOT = 3


class Size(msgspec.Struct, frozen=True):
    """A class of requests: tokens of the prompt and of the answer asked for, and how many of 6."""

    name: str
    prompt: int
    answer: int
    parts: int


def sizes(context: int) -> tuple[Size, ...]:
    """The classes for a slot of `context` tokens; the last asks for twice what it can hold."""
    return (
        Size("short", context // 16, context // 32, 3),
        Size("medium", context // 4, context // 8, 2),
        Size("long", context // 2, 2 * context, 1),
    )


class PressureRow(msgspec.Struct, frozen=True, tag_field="part", tag="pressure"):
    """One class of requests; times in milliseconds. A wait is the time to the first token."""

    size: str
    requests: int
    completed: int
    errors: tuple[str, ...]
    wait_p50: float
    wait_p99: float
    wait_most: float
    queue_p50: float
    """Of the waits, what the worker says was spent before a slot was free."""
    queue_most: float
    completion_tokens: int
    died: int
    """Processes of ours that were gone afterwards, of all classes."""

    @property
    def unfairness(self) -> float:
        """The longest wait over the median one."""
        return self.wait_most / self.wait_p50


def pressure_row(size: str, replies: Sequence[Reply], died: int) -> PressureRow:
    """Sum up a class; without one good reply its times are 0.

    Raises:
        ValueError: there are no replies.
    """
    if not replies:
        raise ValueError(f"no replies of size {size}")
    good = [reply for reply in replies if not reply.error]
    waits = [reply.ttft * 1e3 for reply in good] or [0.0]
    queued = [float(reply.timings.get("queue_ms", 0.0)) for reply in good] or [0.0]
    return PressureRow(
        size=size,
        requests=len(replies),
        completed=len(good),
        errors=tuple(sorted({reply.error for reply in replies if reply.error})),
        wait_p50=percentile(waits, 0.5),
        wait_p99=percentile(waits, 0.99),
        wait_most=max(waits),
        queue_p50=percentile(queued, 0.5),
        queue_most=max(queued),
        completion_tokens=sum(int(reply.usage.get("completion_tokens", 0)) for reply in good),
        died=died,
    )


async def measure_pressure(
    system: System, *, requests: int, slots: int, context: int
) -> AsyncIterator[PressureRow]:
    """Put the load on; failures are counted, not raised."""
    texts, draw = Texts(seed=7), random.Random(7)
    classes = sizes(context)
    parts = [size for size in classes for _ in range(size.parts)]
    order = [parts[number % len(parts)] for number in range(requests)]
    draw.shuffle(order)
    bodies = [
        chat(system, [texts.document(size.prompt - 20), user(texts.task())], size.answer)
        for size in order
    ]
    before = _processes(system)
    replies = await try_all(system, bodies, at_once=USERS_A_SLOT * slots)
    died = len(before - _processes(system))
    for size in classes:
        mine = [reply for of, reply in zip(order, replies, strict=True) if of is size]
        if mine:
            yield pressure_row(size.name, mine, died)


def _processes(system: System) -> set[int]:
    return {pid for root in system.pids.values() for pid in descendants(root)}


def pressure_table(rows: Sequence[PressureRow]) -> str:
    """One line a class, and what went wrong below it."""
    heads = (
        "size",
        "completed",
        "tokens",
        "wait p50, ms",
        "p99",
        "longest",
        "longest / p50",
        "in queue p50",
        "in queue longest",
        "processes that died",
    )
    table = [
        (
            row.size,
            f"{row.completed} of {row.requests}",
            f"{row.completion_tokens:,}",
            *(f"{value:,.0f}" for value in (row.wait_p50, row.wait_p99, row.wait_most)),
            f"{row.unfairness:.2f}" if row.wait_p50 else "-",
            *(f"{value:,.0f}" for value in (row.queue_p50, row.queue_most)),
            str(row.died),
        )
        for row in rows
    ]
    errors = [f"- {row.size}: {error}" for row in rows for error in row.errors]
    return "\n".join([markdown(heads, table), *([""] if errors else []), *errors])
