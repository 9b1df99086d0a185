"""Who may come in: the exact account of one model's slots and queue.

Pure policy: no clock, no socket. The agent offers every arrival, releases what the engine reports
as over, and empties the account when the engine dies; what is free follows from that alone.
"""

from collections import OrderedDict

import msgspec

__all__ = ("Admission", "Admitted", "Dropped", "Refused", "Ticket", "Verdict")

SPENT_SECONDS = 60.0
"""How long an attempt that is over, or was cancelled before it came, is remembered."""

SPENT_LIMIT = 16_384
"""Attempts remembered at most; the oldest are forgotten first."""


class Ticket(msgspec.Struct, frozen=True):
    """One attempt that holds `weight` slots, or waits for them."""

    attempt: int
    reply: str
    weight: int = 1
    arrived: float = 0.0


class Admitted(msgspec.Struct, frozen=True):
    """The attempt is in: position 0 runs, others wait in that place."""

    position: int


class Refused(msgspec.Struct, frozen=True):
    """Nothing was kept; the sender may try elsewhere."""

    reason: str
    retry_after: float


class Dropped(msgspec.Struct, frozen=True):
    """The attempt is known already or was cancelled: it gets no answer at all."""

    reason: str


Verdict = Admitted | Refused | Dropped


class Admission:
    """Slots and bounded queue of one model, first come first served."""

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
        self._seconds = 1.0

    def __contains__(self, attempt: int) -> bool:
        return attempt in self._running or attempt in self._waiting

    def __len__(self) -> int:
        return len(self._running) + len(self._waiting)

    @property
    def free(self) -> int:
        """Slots a newcomer could use at once; none while anybody waits before it."""
        return 0 if self._waiting else self.slots - self._used

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
        # A request wider than the model would wait for ever; it runs with all the slots there are.
        if ticket.weight > self.slots:
            ticket = msgspec.structs.replace(ticket, weight=self.slots)
        if ticket.weight <= self.free:
            self._start(ticket)
            return Admitted(0)
        if len(self._waiting) >= self.queue_limit:
            return Refused("full", self._retry_after())
        self._waiting[ticket.attempt] = ticket
        return Admitted(len(self._waiting))

    def release(self, attempt: int, now: float) -> Ticket | None:
        """Forget an attempt that is over; its slots go to those who wait."""
        ticket = self._running.pop(attempt, None)
        if ticket is not None:
            self._used -= ticket.weight
            self._seconds += 0.1 * (max(0.0, now - ticket.arrived) - self._seconds)
        else:
            ticket = self._waiting.pop(attempt, None)
        if ticket is None:
            return None
        self._spend(attempt, now)
        self._promote()
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
        self._used = 0
        for ticket in lost:
            self._spend(ticket.attempt, now)
        return lost

    def resize(self, slots: int) -> None:
        """Take over the number of slots the engine really set up; only while nothing is in."""
        if slots < 1 or len(self):
            raise ValueError(f"cannot resize to {slots} slots with {len(self)} attempts in")
        self.slots = slots

    def _start(self, ticket: Ticket) -> None:
        self._running[ticket.attempt] = ticket
        self._used += ticket.weight

    def _promote(self) -> None:
        while self._waiting:
            ticket = next(iter(self._waiting.values()))
            if ticket.weight > self.slots - self._used:
                return
            del self._waiting[ticket.attempt]
            self._start(ticket)

    def _retry_after(self) -> float:
        """Guess when a place frees: the usual time in a slot, shared by all slots."""
        return min(60.0, max(0.1, self._seconds * (len(self._waiting) + 1) / self.slots))

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
