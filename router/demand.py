"""This router's account of demand: a `shared.ledger` on the clock, by the models' own names.

Requests are counted in plain numbers and entered some times a second, for the ledger's arithmetic
would be felt on every request; only who waits is entered at once.
"""

import asyncio
import time
from collections import defaultdict

from router.fleet import Fleet
from shared.ledger import DemandLedger

__all__ = ("Demand",)


class _Tally:
    __slots__ = ("requests", "running", "tokens")

    def __init__(self) -> None:
        self.requests = 0
        self.tokens = 0
        self.running = 0
        """Those that began less those that ended."""


class Demand:
    """Counts what happens to requests; aliases count as the model they name."""

    def __init__(self, router: str, fleet: Fleet) -> None:
        self.ledger = DemandLedger(router)
        self.urgent = asyncio.Event()
        """Set when others should hear of something at once."""
        self._fleet = fleet
        self._tallies: defaultdict[str, _Tally] = defaultdict(_Tally)

    def requested(self, model: str) -> None:
        """A request has come."""
        self._tallies[model].requests += 1

    def began(self, model: str) -> None:
        """A worker has taken a request."""
        self._tallies[model].running += 1

    def ended(self, model: str) -> None:
        """A request that a worker had taken is over."""
        self._tallies[model].running -= 1

    def generated(self, model: str, tokens: int) -> None:
        """So many tokens were sent to the client."""
        self._tallies[model].tokens += tokens

    def waits(self, model: str) -> None:
        """A request is held."""
        name, known = self._fleet.canonical(model)
        self.ledger.waits(name, time.time(), known=known)
        self._hurry()

    def waits_no_more(self, model: str) -> None:
        """It is held no more."""
        self.ledger.waits_no_more(self._fleet.canonical(model)[0], time.time())
        self._hurry()

    def enter(self) -> None:
        """Enter what has been counted into the ledger."""
        tallies, self._tallies = self._tallies, defaultdict(_Tally)
        now = time.time()
        for model, tally in tallies.items():
            name, known = self._fleet.canonical(model)
            if tally.requests:
                self.ledger.requested(name, now, known=known, count=tally.requests)
            if tally.running > 0:
                self.ledger.began(name, now, known=known, count=tally.running)
            elif tally.running < 0:
                self.ledger.ended(name, now, count=-tally.running)
            if tally.tokens:
                self.ledger.generated(name, tally.tokens, now)

    def _hurry(self) -> None:
        if self.ledger.urgent:
            self.urgent.set()
