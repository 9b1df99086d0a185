"""Workers that fail again and again are left alone for a while.

Pure: clock and draws are passed in.

    closed --faults--> open --its rest is over--> half open --one request works--> closed
                        ^                            |
                        +-------- it fails ----------+  and rests twice as long

A fault is the worker's own: it does not answer, it dies, it stalls, it says that it has failed.
What is the client's doing (a bad request, a deadline, leaving), and a full queue, count neither
way. Nobody is refused because of a breaker: where only workers that fail are left, they are asked.
"""

from collections import deque
from collections.abc import Callable
from typing import Literal

__all__ = (
    "FAULTS_IN_A_ROW",
    "FIRST_REST",
    "LONGEST_REST",
    "WINDOW",
    "Breaker",
    "Breakers",
    "State",
)

FAULTS_IN_A_ROW = 5
WINDOW = 20
"""Outcomes that are looked at; half of them faults opens the breaker, from `LEAST_OUTCOMES` on."""
LEAST_OUTCOMES = 10
FIRST_REST = 2.0
"""Seconds: about what an engine needs to be started anew."""
LONGEST_REST = 30.0
FORGOTTEN = 600.0
"""Seconds after its last fault from which on nothing is held against a worker."""

State = Literal["closed", "open", "half_open"]


class Breaker:
    """One worker's."""

    __slots__ = ("_fault_at", "_openings", "_outcomes", "_probing", "_rests_until", "_row")

    def __init__(self) -> None:
        self._outcomes: deque[bool] = deque(maxlen=WINDOW)
        self._row = 0
        self._fault_at = float("-inf")
        self._openings = 0
        """In a row, without anything that worked between; 0: closed."""
        self._rests_until = 0.0
        self._probing = False

    @property
    def fault_at(self) -> float:
        """When its last fault happened."""
        return self._fault_at

    def state(self, now: float) -> State:
        """What it is like now."""
        if not self._openings:
            return "closed"
        return "open" if now < self._rests_until else "half_open"

    def bars(self, now: float) -> bool:
        """Whether the worker is to be left alone: it rests, or is being tried by one request."""
        return bool(self._openings) and (now < self._rests_until or self._probing)

    def try_once(self) -> bool:
        """It is asked: whether this is the one try of a breaker that is not closed."""
        if not self._openings or self._probing:
            return False
        self._probing = True
        return True

    def tried(self) -> None:
        """The one try is over, whether it told anything or not."""
        self._probing = False

    def worked(self, asked: float) -> None:
        """An attempt that was asked for at this time has brought an answer, or begun to."""
        if not self._openings:
            self._row = 0
            self._outcomes.append(True)
        elif asked > self._fault_at:
            # else it was at work before: that it comes to its end says nothing of new ones
            self._openings = self._row = 0
            self._probing = False
            self._outcomes.clear()

    def failed(self, asked: float, now: float, draw: float) -> bool:
        """An attempt has failed by the worker's fault; returns whether that opened the breaker.

        What was under way at the last fault belongs to that one: an engine that dies takes many.

        Args:
            asked: when the attempt was asked for.
            now: monotonic seconds, as all times here.
            draw: from 0 to 1: up to a quarter of the rest is taken off, so that routers do not try
                the worker together.
        """
        if asked <= self._fault_at:
            return False
        self._fault_at = now
        self._row += 1
        self._outcomes.append(False)
        faults = self._outcomes.count(False)
        bad = len(self._outcomes) >= LEAST_OUTCOMES and 2 * faults >= len(self._outcomes)
        if not self._openings and self._row < FAULTS_IN_A_ROW and not bad:
            return False
        rest = min(LONGEST_REST, FIRST_REST * 2.0 ** min(self._openings, 16))
        self._openings += 1
        self._rests_until = now + rest * (1 - 0.25 * draw)
        self._probing = False
        return True


class Breakers:
    """All workers'; those without a fault in the last `FORGOTTEN` seconds have none."""

    def __init__(self, clock: Callable[[], float], draw: Callable[[], float]) -> None:
        self._clock = clock
        self._draw = draw
        self._by_worker: dict[str, Breaker] = {}
        self.opened = 0
        """How often one was opened."""

    def barred(self) -> frozenset[str]:
        """The workers to be left alone while others are there."""
        if not self._by_worker:
            return frozenset()
        now = self._clock()
        return frozenset(name for name, one in self._by_worker.items() if one.bars(now))

    def states(self) -> dict[str, State]:
        """Of those that are not closed."""
        now = self._clock()
        states = {name: one.state(now) for name, one in self._by_worker.items()}
        return {name: state for name, state in states.items() if state != "closed"}

    def try_once(self, worker: str) -> bool:
        """A worker is asked: whether `tried` is to be told of the end of it."""
        one = self._by_worker.get(worker)
        return one is not None and one.try_once()

    def tried(self, worker: str) -> None:
        """See `Breaker.tried`."""
        if (one := self._by_worker.get(worker)) is not None:
            one.tried()

    def worked(self, worker: str, asked: float) -> None:
        """See `Breaker.worked`."""
        if (one := self._by_worker.get(worker)) is not None:
            one.worked(asked)

    def failed(self, worker: str, asked: float) -> None:
        """See `Breaker.failed`."""
        now = self._clock()
        for name in [n for n, one in self._by_worker.items() if now - one.fault_at > FORGOTTEN]:
            del self._by_worker[name]
        one = self._by_worker.setdefault(worker, Breaker())
        self.opened += one.failed(asked, now, self._draw())
