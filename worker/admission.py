"""Who may come in: the exact account of one model's slots and queue.

Pure policy: no clock, no socket. The agent offers every arrival, notes what the engine reports as
started and as over, and empties the account when the engine dies; what is free follows from that
alone. Who of those that wait is next is the engine's choice (`worker.engine.fair_queue`).

What is in is never put out again. So that there is room for others, a newcomer is refused before
the queue is full if its owner, or batch requests, have much of it already: an owner `OWNER_SHARE`
times the places that are free, batch requests as many as are free. With 64 places that is 48 for
one owner and 32 for batch requests, and a place for whoever comes next. It is so only where there
is somebody to keep them for: another owner, or an interactive request, within `LATELY`.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable
from math import inf

import msgspec

from shared.protocol import Priority
from worker.forecast import Forecast

__all__ = ("Admission", "Admitted", "Dropped", "Refused", "Ticket", "Verdict")

SPENT_SECONDS = 60.0
"""How long an attempt that is over, or was cancelled before it came, is remembered."""

SPENT_LIMIT = 16_384
"""Attempts remembered at most; the oldest are forgotten first."""

WAIT_SHARE = 1 / 3
"""Of the time that a request has beside its answer, what it may be made to wait: a forecast that is
wrong by a factor of three still keeps its deadline, and what a queue holds when an overload ends is
worked off soon. With all of it, at five times the capacity and deadlines of 15 s, half of what was
taken was late (docs/failing.md)."""

OWNER_SHARE = 3
LATELY = 60.0
"""Seconds for which the queue is shared after somebody else has come."""


class Ticket(msgspec.Struct, frozen=True):
    """One attempt that holds `weight` slots, or waits for them."""

    attempt: int
    reply: str
    weight: int = 1
    owner: str = ""
    priority: Priority = "interactive"
    tokens: int = 0
    """The most that it wants; 0: it does not say."""
    deadline: float = inf
    """When its answer has to be there, in monotonic seconds."""
    started: float = 0.0
    """When it got its slots."""


class Admitted(msgspec.Struct, frozen=True):
    """The attempt is in: position 0 runs, of others so many wait, itself included."""

    position: int


class Refused(msgspec.Struct, frozen=True):
    """Nothing was kept; the sender may try elsewhere.

    `reason` is `draining`, `full`, or `late`: there is a place, but no time.
    """

    reason: str
    retry_after: float


class Dropped(msgspec.Struct, frozen=True):
    """The attempt is known already or was cancelled: it gets no answer at all."""

    reason: str


Verdict = Admitted | Refused | Dropped


class Admission:
    """Slots and bounded queue of one model."""

    def __init__(self, slots: int, queue_limit: int) -> None:
        if slots < 1 or queue_limit < 0:
            raise ValueError(f"slots {slots} must be at least 1, queue {queue_limit} at least 0")
        self.slots = slots
        self.queue_limit = queue_limit
        self.draining = False
        self._running: dict[int, Ticket] = {}
        self._waiting: dict[int, Ticket] = {}
        self._used = 0
        self._spent: OrderedDict[int, float] = OrderedDict()
        self._forecast = Forecast()
        self._waiting_of: Counter[str] = Counter()
        self._waiting_batch = 0
        self._last_owner: str | None = None
        self._owners_until = 0.0
        self._interactive_until = 0.0

    def __contains__(self, attempt: int) -> bool:
        return attempt in self._running or attempt in self._waiting

    def __len__(self) -> int:
        return len(self._running) + len(self._waiting)

    @property
    def free(self) -> int:
        """Slots a newcomer could use at once; none while anybody waits before it."""
        return 0 if self._waiting else max(0, self.slots - self._used)

    @property
    def queued(self) -> int:
        """Attempts that wait."""
        return len(self._waiting)

    @property
    def tickets(self) -> tuple[Ticket, ...]:
        """Of all that is in: what runs, then what waits."""
        return (*self._running.values(), *self._waiting.values())

    def ticket(self, attempt: int) -> Ticket | None:
        """The ticket of an attempt that is in."""
        return self._running.get(attempt) or self._waiting.get(attempt)

    def offer(self, ticket: Ticket, now: float) -> Verdict:
        """Let an arrival in, refuse it, or drop it."""
        self._forget(now)
        if ticket.attempt in self:
            return Dropped("duplicate")
        if ticket.attempt in self._spent:
            return Dropped("spent")
        if self.draining:
            return Refused("draining", 1.0)
        self._note(ticket, now)
        # A request wider than the model would wait for ever; it runs with all the slots there are.
        if ticket.weight > self.slots:
            ticket = msgspec.structs.replace(ticket, weight=self.slots)
        if ticket.weight <= self.free:
            self._start(ticket, now)
            return Admitted(0)
        if not self._has_place(ticket, now):
            return Refused("full", self._retry_after(now))
        if self._is_late(ticket, now):
            return Refused("late", self._retry_after(now))
        self._waiting[ticket.attempt] = ticket
        self._waiting_of[ticket.owner] += 1
        self._waiting_batch += ticket.priority == "batch"
        return Admitted(len(self._waiting))

    def started(self, attempts: Iterable[int], now: float) -> bool:
        """The engine has given these their slots; returns whether any of them was waiting.

        Of those that ran at once it is known, and those that are out may be told of, too.
        """
        any_left = False
        for attempt in attempts:
            ticket = self._leave_queue(attempt)
            if ticket is not None:
                self._start(ticket, now)
                any_left = True
        return any_left

    def release(self, attempt: int, now: float) -> Ticket | None:
        """Forget an attempt that is over."""
        ticket = self._running.pop(attempt, None)
        if ticket is not None:
            self._used -= ticket.weight
            self._forecast.ended(now - ticket.started, ticket.tokens)
        else:
            ticket = self._leave_queue(attempt)
        if ticket is not None:
            self._spend(attempt, now)
        return ticket

    def cancel(self, attempt: int, now: float) -> Ticket | None:
        """Note a cancellation.

        Returns the ticket if the attempt is in: it keeps its slots until it is released. Otherwise
        the attempt is remembered, so that it is dropped if it arrives after its cancellation.
        """
        ticket = self.ticket(attempt)
        if ticket is None:
            self._spend(attempt, now)
        return ticket

    def clear(self, now: float) -> tuple[Ticket, ...]:
        """Release everything at once, as when the engine died; returns what was in."""
        lost = self.tickets
        self._running.clear()
        self._waiting.clear()
        self._waiting_of.clear()
        self._waiting_batch = 0
        self._used = 0
        for ticket in lost:
            self._spend(ticket.attempt, now)
        return lost

    def resize(self, slots: int) -> None:
        """Take over the number of slots the engine really set up; only while nothing is in."""
        if slots < 1 or len(self):
            raise ValueError(f"cannot resize to {slots} slots with {len(self)} attempts in")
        self.slots = slots

    def _note(self, ticket: Ticket, now: float) -> None:
        if ticket.owner != self._last_owner:
            if self._last_owner is not None:
                self._owners_until = now + LATELY
            self._last_owner = ticket.owner
        if ticket.priority == "interactive":
            self._interactive_until = now + LATELY

    def _has_place(self, ticket: Ticket, now: float) -> bool:
        left = self.queue_limit - len(self._waiting)
        if left <= 0:
            return False
        batch = ticket.priority == "batch" and now < self._interactive_until
        if batch and self._waiting_batch >= left:
            return False
        return now >= self._owners_until or self._waiting_of[ticket.owner] < OWNER_SHARE * left

    def _start(self, ticket: Ticket, now: float) -> None:
        self._running[ticket.attempt] = msgspec.structs.replace(ticket, started=now)
        self._used += ticket.weight

    def _leave_queue(self, attempt: int) -> Ticket | None:
        ticket = self._waiting.pop(attempt, None)
        if ticket is not None:
            self._waiting_of[ticket.owner] -= 1
            if not self._waiting_of[ticket.owner]:
                del self._waiting_of[ticket.owner]
            self._waiting_batch -= ticket.priority == "batch"
        return ticket

    def _is_late(self, ticket: Ticket, now: float) -> bool:
        latest = WAIT_SHARE * (ticket.deadline - now - self._forecast.answer(ticket.tokens))
        # Who goes first is only looked at where it matters.
        return self._wait(len(self._waiting), now) > latest and (
            self._wait(self._ahead_of(ticket), now) > latest
        )

    def _ahead_of(self, ticket: Ticket) -> int:
        """How many of those that wait go before a newcomer: by class, and by turns of owners."""
        batch = ticket.priority == "batch"
        waiting = Counter(
            other.owner for other in self._waiting.values() if batch or other.priority != "batch"
        )
        own = waiting.pop(ticket.owner, 0)
        return own + sum(min(count, own + 1) for count in waiting.values())

    def _wait(self, ahead: int, now: float) -> float:
        ages = [now - ticket.started for ticket in self._running.values()]
        return self._forecast.wait(ahead, self.slots, ages)

    def _retry_after(self, now: float) -> float:
        """Guess when all that waits has begun."""
        return min(60.0, max(0.1, self._wait(len(self._waiting), now)))

    def _spend(self, attempt: int, now: float) -> None:
        self._spent[attempt] = now + SPENT_SECONDS
        self._spent.move_to_end(attempt)
        if len(self._spent) > SPENT_LIMIT:
            self._spent.popitem(last=False)

    def _forget(self, now: float) -> None:
        while self._spent:
            attempt, until = next(iter(self._spent.items()))
            if until > now:
                return
            del self._spent[attempt]
