"""Part "throughput": tokens a second, time to the first token, pauses between tokens.

A closed loop of so many users; every prompt is a new one, every answer has the same length.
"""

from collections.abc import AsyncIterator, Sequence

import msgspec

from loadtests.figures import markdown, median_and_range
from loadtests.http_load import closed_loop
from loadtests.peers.asking import TIMEOUT, PartFailed, chat, milliseconds, pauses
from loadtests.peers.systems import OURS, System
from loadtests.peers.texts import Texts

__all__ = ("ThroughputRow", "count_of", "measure_throughput", "ratios", "throughput_table")

LEAST_REQUESTS = 4
_NOTE = (
    "ITL is the pause from one arrival to the next; tokens that come of one step arrive together. "
    "CPU is that of all processes of a system."
)


class ThroughputRow(msgspec.Struct, frozen=True, tag_field="part", tag="throughput"):
    """One system at one concurrency in one repetition; times in milliseconds."""

    rep: int
    system: str
    concurrent: int
    tokens_per_second: float
    """Completion tokens over the time of the whole loop, prefill included."""
    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float
    cpu_per_token: float
    """CPU of all processes of the system, in milliseconds."""


def count_of(concurrent: int, rounds: int) -> int:
    """Requests of a loop: `rounds` a user, and never so few that one decides the figure."""
    return max(LEAST_REQUESTS, rounds * concurrent)


async def _loop(
    system: System, requests: Sequence[bytes], rep: int, concurrent: int, tokens: int
) -> ThroughputRow:
    count = len(requests)
    result = await closed_loop(
        system.target,
        requests,
        connections=concurrent,
        count=count,
        timeout=TIMEOUT,
        pids=system.pids,
    )
    if result.errors:
        raise PartFailed(f"{system.name}: {result.errors}")
    if result.completion_tokens != count * tokens:
        raise PartFailed(
            f"{system.name}: {result.completion_tokens} tokens in {count} answers; "
            f"{tokens} each were asked for with ignore_eos"
        )
    gaps = pauses(result.gaps)
    return ThroughputRow(
        rep=rep,
        system=system.name,
        concurrent=concurrent,
        tokens_per_second=result.completion_tokens / result.seconds,
        ttft_p50=milliseconds(result.ttft, 0.5),
        ttft_p99=milliseconds(result.ttft, 0.99),
        itl_p50=milliseconds(gaps, 0.5),
        itl_p99=milliseconds(gaps, 0.99),
        cpu_per_token=result.microseconds("", result.completion_tokens) / 1e3,
    )


async def measure_throughput(
    systems: Sequence[System], *, levels: Sequence[int], reps: int, rounds: int, tokens: int
) -> AsyncIterator[ThroughputRow]:
    """Ask all systems the same at each concurrency, in turns that change with the repetition.

    Raises:
        PartFailed: a request failed, or an answer was shorter than asked for.
    """
    texts = Texts(seed=1)
    for system in systems:
        warm = [chat(system, texts.short(), 16) for _ in range(LEAST_REQUESTS)]
        await _loop(system, warm, -1, LEAST_REQUESTS, 16)
    for rep in range(reps):
        for level in levels:
            prompts = [texts.short() for _ in range(count_of(level, rounds))]
            for turn in range(len(systems)):
                system = systems[(turn + rep) % len(systems)]
                requests = [chat(system, prompt, tokens) for prompt in prompts]
                yield await _loop(system, requests, rep, level, tokens)


def ratios(rows: Sequence[ThroughputRow], concurrent: int, system: str) -> list[float]:
    """Tokens a second of ours over those of `system`, repetition by repetition."""
    rate = {
        (row.rep, row.system): row.tokens_per_second for row in rows if row.concurrent == concurrent
    }
    return [
        ours / rate[rep, system]
        for (rep, name), ours in rate.items()
        if name == OURS and (rep, system) in rate
    ]


def throughput_table(rows: Sequence[ThroughputRow]) -> str:
    """Medians of all repetitions with their range; ratios are those within a repetition."""
    heads = (
        "concurrent",
        "system",
        "tok/s",
        "ours / this",
        "TTFT p50, ms",
        "TTFT p99, ms",
        "ITL p50, ms",
        "ITL p99, ms",
        "CPU ms/token",
    )
    table = []
    for level in sorted({row.concurrent for row in rows}):
        for system in dict.fromkeys(row.system for row in sorted(rows, key=_ours_first)):
            mine = [row for row in rows if (row.concurrent, row.system) == (level, system)]
            figures = [
                median_and_range([getattr(row, name) for row in mine])
                for name in ("ttft_p50", "ttft_p99", "itl_p50", "itl_p99", "cpu_per_token")
            ]
            rate = median_and_range([row.tokens_per_second for row in mine])
            ratio = "" if system == OURS else median_and_range(ratios(rows, level, system))
            table.append((str(level), system, rate, ratio, *figures))
    return f"{markdown(heads, table)}\n\n{_NOTE}"


def _ours_first(row: ThroughputRow) -> tuple[bool, str]:
    return row.system != OURS, row.system
