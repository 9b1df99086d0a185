"""This router's account of demand: a `shared.ledger` on the clock, by the models' own names."""

import asyncio
import time

from router.fleet import Fleet
from shared.ledger import DemandLedger

__all__ = ("Demand",)


class Demand:
    """Counts what happens to requests; aliases count as the model they name."""

    def __init__(self, router: str, fleet: Fleet) -> None:
        self.ledger = DemandLedger(router)
        self.urgent = asyncio.Event()
        """Set when others should hear of something at once."""
        self._fleet = fleet

    def requested(self, model: str) -> None:
        """A request has come."""
        name, known = self._fleet.canonical(model)
        self.ledger.requested(name, time.time(), known=known)

    def waits(self, model: str) -> None:
        """A request is held."""
        name, known = self._fleet.canonical(model)
        self.ledger.waits(name, time.time(), known=known)
        self._hurry()

    def waits_no_more(self, model: str) -> None:
        """It is held no more."""
        self.ledger.waits_no_more(self._fleet.canonical(model)[0], time.time())
        self._hurry()

    def began(self, model: str) -> None:
        """A worker has taken a request."""
        name, known = self._fleet.canonical(model)
        self.ledger.began(name, time.time(), known=known)

    def ended(self, model: str) -> None:
        """A request that a worker had taken is over."""
        self.ledger.ended(self._fleet.canonical(model)[0], time.time())

    def generated(self, model: str, tokens: int) -> None:
        """So many tokens were sent to the client."""
        self.ledger.generated(self._fleet.canonical(model)[0], tokens, time.time())

    def _hurry(self) -> None:
        if self.ledger.urgent:
            self.urgent.set()
