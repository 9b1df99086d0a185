"""Everybody's demand as heard: what each router has written last into the bucket, summed by model.

Whoever hears the bucket keeps one: workers to decide, routers to export what they wish for,
`mesh top` to show it. Pure but for its memory: writes and the clock are passed in.
"""

import msgspec
import structlog

from shared import subjects
from shared.demand import Demand, DemandEntry, decode_entry, total
from shared.kv import Entry
from shared.ledger import FORGET

__all__ = ("DemandView",)

_log = structlog.get_logger()


class DemandView:
    """The last entry of each router for each model."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[DemandEntry, int]] = {}

    def hear(self, written: Entry) -> DemandEntry | None:
        """Take a write; returns the entry if it counts.

        An older write than the one known is ignored. One that cannot be read, or speaks in another
        router's name, is none, and leaves nothing known of that key.
        """
        known = self._entries.get(written.key)
        if known is not None and written.revision < known[1]:
            return None
        self._entries.pop(written.key, None)
        if written.value is None:
            return None
        try:
            entry = decode_entry(written.value)
            owner = subjects.read_demand_key(written.key)
        except (msgspec.DecodeError, ValueError) as error:
            _log.warning("demand.undecodable", key=written.key, reason=str(error))
            return None
        if owner != (entry.model, entry.router):
            _log.warning("demand.misnamed", key=written.key, model=entry.model, router=entry.router)
            return None
        self._entries[written.key] = (entry, written.revision)
        return entry

    def begin_anew(self) -> None:
        """Take any write from now on: a bucket that was lost and made anew counts from 1."""
        self._entries = {key: (entry, 0) for key, (entry, _) in self._entries.items()}

    def of(self, router: str) -> list[DemandEntry]:
        """What one router has told."""
        return [entry for entry, _ in self._entries.values() if entry.router == router]

    def total(self, now: float) -> dict[str, Demand]:
        """All routers' demand at a moment, by model; entries not renewed for `FORGET` are dropped.

        Args:
            now: unix time.
        """
        self._entries = {
            key: (entry, revision)
            for key, (entry, revision) in self._entries.items()
            if now - entry.at <= FORGET
        }
        return total((entry for entry, _ in self._entries.values()), now)
