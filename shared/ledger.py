"""A router's own account of demand: it counts, and says what must be told to the others.

Pure but for its memory: the clock is passed in. A call costs about two microseconds, so that
every request can be counted. Names that no worker knows are counted too, since a worker that comes
may know them, but only so many, and all names are forgotten some time after their last use.
"""

import math
from collections.abc import Iterable

import msgspec

from shared.demand import (
    HALF_LIFE,
    LOAD_HALF_LIFE,
    REFRESH,
    SUSTAINED_HALF_LIFE,
    DemandEntry,
    brought_to,
)

__all__ = ("FORGET", "LEAST_PAUSE", "MOST_UNKNOWN", "UNKNOWN_KEPT", "DemandLedger")

FORGET = 10 * HALF_LIFE
"""Seconds without use after which a name is forgotten: a thousandth of its count is left then.
Entries in the bucket need not be kept longer."""
MOST_UNKNOWN = 100
"""Names that nobody serves or could load; the one used longest ago makes room for a new one."""
UNKNOWN_KEPT = 60.0
"""Seconds for which such a name keeps its place after its last use. Each new one is told to all
and remembered by all for `FORGET`: so that clients that make names up, thousands a second, cost the
fleet some 600 entries a router, and do not fill the bucket."""
LEAST_PAUSE = 1.0
"""Seconds between two entries of one model, unless somebody begins or ceases to wait."""


class _Account(msgspec.Struct):
    """One model's numbers as of `at`; the fields of `DemandEntry`, and what was told last."""

    at: float
    known: bool
    requests: float = 0.0
    tokens: float = 0.0
    waiting: int = 0
    waiting_since: float = 0.0
    running: int = 0
    load: float = 0.0
    sustained: float = 0.0
    last_use: float = 0.0
    touched: bool = True
    told: DemandEntry | None = None

    def advance(self, now: float) -> None:
        """Bring the numbers to `now`; a clock that was set back stands still meanwhile."""
        age = now - self.at
        if age <= 0:
            return
        fade = math.exp2(-age / HALF_LIFE)
        self.requests *= fade
        self.tokens *= fade
        running = self.running
        self.load = running + (self.load - running) * math.exp2(-age / LOAD_HALF_LIFE)
        self.sustained = running + (self.sustained - running) * math.exp2(
            -age / SUSTAINED_HALF_LIFE
        )
        if running or self.waiting:
            self.last_use = now
        self.at = now

    def due(self, now: float) -> bool:
        """Whether the others must hear of it: a reader's own reckoning has become wrong."""
        told = self.told
        if told is None or bool(told.waiting) != bool(self.waiting):
            return True
        age = now - told.at
        if age < LEAST_PAUSE:
            return False
        if age >= REFRESH:
            return self.touched or self.running > 0 or self.waiting > 0
        # A difference that chance makes anyway (arrivals are Poisson) is no news.
        drift = abs(self.running - told.running)
        return self.waiting != told.waiting or drift > 2 * math.sqrt(told.running + 1)


class DemandLedger:
    """What one router has counted, by model."""

    def __init__(self, router: str, *, most_unknown: int = MOST_UNKNOWN) -> None:
        if most_unknown < 1:
            raise ValueError(f"most_unknown {most_unknown}: wanted 1 or more")
        self.router = router
        self._most_unknown = most_unknown
        self._unknown = 0
        self._accounts: dict[str, _Account] = {}
        self._urgent = False

    @property
    def urgent(self) -> bool:
        """Whether somebody has begun to wait, or to wait no more, since `due` was asked."""
        return self._urgent

    def __len__(self) -> int:
        return len(self._accounts)

    def requested(self, model: str, now: float, *, known: bool = True, count: int = 1) -> None:
        """So many requests have come; `known`: whether a worker serves the model or could."""
        account = self._open(model, now, known)
        if account is not None:
            account.requests += count
            account.last_use = account.at

    def generated(self, model: str, tokens: int, now: float) -> None:
        """So many tokens were sent to clients."""
        account = self._at(model, now)
        if account is not None:
            account.tokens += tokens

    def waits(self, model: str, now: float, *, known: bool = True) -> None:
        """A request finds no worker that takes it."""
        account = self._open(model, now, known)
        if account is not None:
            account.waiting += 1
            account.last_use = account.at
            if account.waiting == 1:
                account.waiting_since = account.at
                self._urgent = True

    def waits_no_more(self, model: str, now: float) -> None:
        """One that waited was taken, refused, or has left."""
        account = self._at(model, now)
        if account is not None and account.waiting:
            account.waiting -= 1
            if not account.waiting:
                account.waiting_since = 0.0
                self._urgent = True

    def began(self, model: str, now: float, *, known: bool = True, count: int = 1) -> None:
        """Workers have taken so many requests."""
        account = self._open(model, now, known)
        if account is not None:
            account.running += count
            account.last_use = account.at

    def ended(self, model: str, now: float, *, count: int = 1) -> None:
        """So many requests that workers had taken are over."""
        account = self._at(model, now)
        if account is not None:
            account.running = max(0, account.running - count)

    def entry(self, model: str, now: float) -> DemandEntry | None:
        """What would be told of a model now; None: nothing is known of it."""
        account = self._accounts.get(model)
        if account is None:
            return None
        account.advance(now)
        return self._entry(model, account)

    def due(self, now: float) -> list[DemandEntry]:
        """The entries that must be told now, which count as told; names long unused are forgotten.

        Ask some times a second, and at once when `urgent`.
        """
        self._urgent = False
        found: list[DemandEntry] = []
        for model, account in list(self._accounts.items()):
            if account.due(now):
                account.advance(now)
                account.touched = False
                account.told = self._entry(model, account)
                found.append(account.told)
            elif now - account.last_use > FORGET and not account.running and not account.waiting:
                self._close(model)
        return found

    def take_over(self, entries: Iterable[DemandEntry], now: float) -> None:
        """Go on from what a router of this name told before it was restarted.

        Entries of other routers are left alone. What has been counted here already is kept.
        """
        for entry in entries:
            if entry.router != self.router or now - entry.last_use > FORGET:
                continue
            # what ran or waited died with the former process
            old = brought_to(msgspec.structs.replace(entry, running=0, waiting=0), now)
            account = self._open(entry.model, now, known=True)
            if account is not None:
                account.requests += old.requests
                account.tokens += old.tokens
                account.load += old.load
                account.sustained += old.sustained
                account.last_use = max(account.last_use, min(old.last_use, now))

    def _at(self, model: str, now: float) -> _Account | None:
        account = self._accounts.get(model)
        if account is not None:
            account.advance(now)
            account.touched = True
        return account

    def _open(self, model: str, now: float, known: bool) -> _Account | None:
        """The model's account, made if there is room for its name."""
        account = self._at(model, now)
        if account is None:
            full = not known and self._unknown >= self._most_unknown
            if full and not self._make_room(unused_since=now - UNKNOWN_KEPT):
                return None
            account = self._accounts[model] = _Account(at=now, known=known, last_use=now)
            self._unknown += not known
        elif account.known != known:
            self._unknown += 1 if account.known else -1
            account.known = known
            if self._unknown > self._most_unknown:
                self._make_room(unused_since=now)
        return account

    def _make_room(self, unused_since: float) -> bool:
        """Forget the unknown name that was used longest ago, if it is so long ago."""
        unused = [
            (account.last_use, model)
            for model, account in self._accounts.items()
            if not (account.known or account.running or account.waiting)
            and account.last_use <= unused_since
        ]
        if unused:
            self._close(min(unused)[1])
        return bool(unused)

    def _close(self, model: str) -> None:
        self._unknown -= not self._accounts.pop(model).known

    def _entry(self, model: str, account: _Account) -> DemandEntry:
        return DemandEntry(
            model,
            self.router,
            account.at,
            account.requests,
            account.tokens,
            account.waiting,
            account.waiting_since,
            account.running,
            account.load,
            account.sustained,
            account.last_use,
        )
