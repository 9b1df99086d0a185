"""What the engine's steps cost on this machine: how it is measured, and what is made of it.

The measuring is policy over a `Stepper`, so that tests can give it a machine of their own; the real
one is `stepper.py`. llama.cpp computes a single row with the decode threads and several rows with
the prefill threads (`llama_context::graph_compute`); the costs here are those of that same pair. It
does not matter whose the rows are: so many of one sequence cost what one row each of so many does
(SmolLM2 in Q4_0, Q4_1 and F32, 1 to 32 rows, 1 and 2 threads: within 3 %, which is the noise).
Sequences with unequal numbers of rows are another matter: llama.cpp cuts their step into one pass
for each number that occurs, and the costs of the passes add up.
"""

import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Protocol

import msgspec

__all__ = (
    "WIDTHS",
    "Asked",
    "Calibration",
    "Stepper",
    "calibrate",
    "fewest_threads",
    "nominal",
)

WIDTHS = (1, 2, 4, 8, 16, 32, 3, 6, 12, 24, 48, 5, 7)
"""Rows of the steps that are measured, the most telling first, should the time run out. All from 1
to 8 are there since repacked formats compute four rows at a time: 8 rows of Q4_0 take less than 6.
"""

NARROW = 8
"""Up to here a step is measured several times: speculation compares widths that are close."""
DEPTH = 128
"""Tokens in the cache before the measured rows."""
FIRST_CHUNK = 16
"""Rows of the first prefill, which tells whether `DEPTH` is affordable."""
USUAL_SECONDS = 2.0
"""What it takes with a small model."""
MOST_SECONDS = 10.0
"""No step is begun that would end later than this."""
REPETITIONS_UNTIL = (MOST_SECONDS, 4.0, 4.0, USUAL_SECONDS, USUAL_SECONDS)
"""Seconds from the start until which a step is measured for the first, second and further time."""
PREFILL_SHARE = 0.2
"""Of `MOST_SECONDS`, what filling the cache may take."""
AS_FAST = 1.05
"""Up to this factor, fewer threads count as equally fast."""


_Count = Annotated[int, msgspec.Meta(ge=1)]
_Seconds = Annotated[float, msgspec.Meta(gt=0)]


class Calibration(msgspec.Struct, frozen=True):
    """Threads to use and what steps cost with them."""

    threads: _Count
    """For a single row."""
    prefill_threads: _Count
    """For several rows, of one sequence or many."""
    poll: int
    """Rounds that a thread spins before it sleeps, when it waits for another; -1: unknown."""
    step_seconds: Annotated[tuple[tuple[_Count, _Seconds], ...], msgspec.Meta(min_length=1)]
    """(rows, seconds) of a step, rows ascending, at least one."""
    prefill_row_seconds: _Seconds
    """Seconds of a row of a long prefill."""
    thread_seconds: tuple[tuple[_Count, _Seconds], ...] = ()
    """(threads, seconds) of a step with a single row, threads ascending, as far as tried."""

    def seconds(self, rows: float) -> float:
        """Seconds of a step with so many rows: straight lines between what was measured.

        Beyond the widest it goes on as the last two tell, and below the narrowest it stays. For
        rows that llama.cpp computes in several passes, add up the passes.
        """
        points = self.step_seconds
        at = bisect_left(points, rows, key=lambda point: point[0])
        if at == 0:
            return points[0][1]
        if at < len(points):
            (left, low), (right, high) = points[at - 1], points[at]
            return high - (high - low) * (right - rows) / (right - left)
        widest, most = points[-1]
        slope = self.prefill_row_seconds
        if len(points) > 1:
            # From half the width on: the last two alone may lie on the two sides of a sawtooth.
            before = [point for point in points[:-1] if 2 * point[0] <= widest] or points[:1]
            width, cost = before[-1]
            slope = (most - cost) / (widest - width)
        return most + max(0.0, slope) * (rows - widest)


class Asked(msgspec.Struct, frozen=True):
    """What the operator said about threads, and what the machine has."""

    cores: int
    """That this process may use."""
    threads: int = 0
    """0: to be chosen."""
    prefill_threads: int = 0
    """0: to be chosen, or as `threads` if that is not 0."""

    @property
    def limit(self) -> int:
        """Most threads that are ever chosen: one core is left to the rest, if there is another."""
        return self.threads or max(1, self.cores - 1)

    def candidates(self) -> tuple[int, ...]:
        """Threads worth a measurement, most first; one more than the limit only to be told."""
        if self.threads:
            return (self.threads,)
        powers = (1 << bit for bit in range(self.cores.bit_length()))
        return tuple(sorted({self.cores, self.limit, *powers}, reverse=True))


class Stepper(Protocol):
    """A machine with a model, as far as it is measured. Times are in seconds."""

    def set_threads(self, decode: int, prefill: int) -> None:
        """Compute with so many threads from now on."""

    def prefill(self, rows: int) -> float:
        """Put rows into the cache, to stay there."""

    def step(self, rows: int) -> float:
        """Compute rows with all their logits, on top of what is in the cache, and drop them."""


def nominal(asked: Asked, poll: int) -> Calibration:
    """A calibration without a measurement: the threads asked for, else a core less than there are.

    The costs are those of a model of about 100 million parameters on one core of 2024. Only their
    proportions matter much, and they are those of a CPU: further rows cost half of the first.
    """
    return Calibration(
        threads=asked.limit,
        prefill_threads=asked.prefill_threads or asked.limit,
        poll=poll,
        step_seconds=((1, 0.010), (2, 0.015), (4, 0.025), (8, 0.040), (16, 0.070), (48, 0.200)),
        prefill_row_seconds=0.004,
    )


def fewest_threads(seconds: Mapping[int, float], limit: int) -> int:
    """The fewest threads, at most `limit`, that are as fast as the fastest of these.

    Raises:
        ValueError: none of them is within the limit.
    """
    allowed = {count: time for count, time in seconds.items() if count <= limit}
    best = min(allowed.values())
    return min(count for count, time in allowed.items() if time <= AS_FAST * best)


def calibrate(
    stepper: Stepper,
    asked: Asked,
    *,
    poll: int,
    most_rows: int,
    clock: Callable[[], float] = time.perf_counter,
    tell: Callable[[float], None] = lambda fraction: None,
) -> Calibration:
    """Measure, within about 2 s for a small model and 10 s for any whose single row takes less.

    Args:
        stepper: an empty cache.
        asked: the operator's wishes.
        poll: see `Calibration.poll`; only passed on.
        most_rows: rows that a step may have; wider ones of `WIDTHS` are left out.
        clock: seconds that pass.
        tell: called with the part that is done, 0 to 1, now and then.
    """
    begun = clock()

    def passed() -> float:
        return clock() - begun

    def told() -> None:
        tell(min(1.0, passed() / USUAL_SECONDS))

    limit, prefill_limit = asked.limit, asked.prefill_threads or asked.limit
    stepper.set_threads(limit, prefill_limit)
    row_seconds = _fill(stepper, most_rows, told)
    threads, tried = _choose(stepper, asked, passed, told)
    prefill_threads = asked.prefill_threads or limit
    if not asked.threads and not asked.prefill_threads:
        prefill_threads = _choose_prefill(stepper, limit, tried, passed, told)
    stepper.set_threads(threads, prefill_threads)
    widths = [rows for rows in WIDTHS if rows <= most_rows]
    steps = _survey(stepper, widths, tried.get(threads, []), passed, told)
    tell(1.0)
    return Calibration(
        threads=threads,
        prefill_threads=prefill_threads,
        poll=poll,
        step_seconds=_points(steps),
        prefill_row_seconds=row_seconds,
        thread_seconds=_points(tried),
    )


def _points(times: Mapping[int, Iterable[float]]) -> tuple[tuple[int, float], ...]:
    # What disturbs a measurement makes it longer, so of two the shorter is the better one.
    return tuple((key, statistics.median_low(times[key])) for key in sorted(times))


def _fill(stepper: Stepper, most_rows: int, told: Callable[[], None]) -> float:
    """Fill the cache as far as time allows; seconds a row of the longest chunk."""
    chunk = min(FIRST_CHUNK, most_rows)
    first = stepper.prefill(chunk) / chunk
    told()
    affordable = int(PREFILL_SHARE * MOST_SECONDS / max(first, 1e-9))
    rest = min(DEPTH - chunk, most_rows, affordable)
    if rest < FIRST_CHUNK:
        return first
    seconds = stepper.prefill(rest) / rest
    told()
    return seconds


def _choose(
    stepper: Stepper, asked: Asked, passed: Callable[[], float], told: Callable[[], None]
) -> tuple[int, dict[int, list[float]]]:
    """Threads for a single row, and all that were tried, with their times."""
    tried: dict[int, list[float]] = {}
    for count in asked.candidates():
        within = {threads: times[-1] for threads, times in tried.items() if threads <= asked.limit}
        if within and _enough(within, passed()):
            break
        stepper.set_threads(count, count)
        tried[count] = []
        for _ in range(3):
            tried[count].append(stepper.step(1))
            told()
            if tried[count][-1] > USUAL_SECONDS / 4:
                break
    medians = {count: statistics.median_low(times) for count, times in tried.items()}
    return asked.threads or fewest_threads(medians, asked.limit), tried


def _choose_prefill(
    stepper: Stepper,
    limit: int,
    tried: Iterable[int],
    passed: Callable[[], float],
    told: Callable[[], None],
) -> int:
    """Threads for several rows, of those that were tried for one."""
    if limit == 1:
        return 1
    seconds: dict[int, float] = {}
    for count in sorted((count for count in tried if count <= limit), reverse=True):
        if seconds and _enough(seconds, passed()):
            break
        stepper.set_threads(count, count)
        seconds[count] = min(stepper.step(NARROW) for _ in range(2))
        told()
    return fewest_threads(seconds, limit)


def _enough(seconds: Mapping[int, float], passed: float) -> bool:
    """Whether fewer threads than those tried would only be slower still, or time is short."""
    return seconds[min(seconds)] > 1.5 * min(seconds.values()) or passed > MOST_SECONDS / 2


def _survey(
    stepper: Stepper,
    widths: Iterable[int],
    single: Iterable[float],
    passed: Callable[[], float],
    told: Callable[[], None],
) -> dict[int, list[float]]:
    """Times of steps by width; `single` are those that are known of one row."""
    times: dict[int, list[float]] = {rows: [] for rows in widths}
    times[1] = list(single)
    for repetition, until in enumerate(REPETITIONS_UNTIL):
        for rows, known in times.items():
            if len(known) > repetition or (repetition and rows > NARROW):
                continue
            if passed() + _expected(times, rows) > until and times[1]:
                continue
            known.append(stepper.step(rows))
            told()
    return {rows: measured for rows, measured in times.items() if measured}


def _expected(times: Mapping[int, list[float]], rows: int) -> float:
    """What a step will take at most, as far as can be told from those that are done."""
    done = {width: min(measured) for width, measured in times.items() if measured}
    if not done:
        return 0.0
    if rows in done:
        return done[rows]
    nearest = max((width for width in done if width < rows), default=min(done))
    return done[nearest] * max(1.0, rows / nearest)
