"""Leases: who holds replica number n of a model. Exactly one worker does, or nobody.

A lease is a key of the roles bucket. It is claimed by a write that is taken only if the key is
absent, and renewed by one that is taken only if nobody else has written since. The server forgets
what is not renewed for `LEASE_SECONDS`, by its own clock, so that no two hosts' clocks are ever
compared. The bucket does not answer: whoever writes follows it, and sees what was taken.

What a holder wrote at time t (its own clock) is in the bucket until t + `LEASE_SECONDS` at least,
so that until then nobody else can have it. Beyond, it may still be ours: the holder renews or
claims anew, and gives up only when it sees another's claim. While NATS is away that can be
long after; two workers may then serve the model for a moment, which harms nobody.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import msgspec
import structlog

from shared import subjects
from shared.bus import BusUnavailable
from shared.groups import Group
from shared.kv import LEASE_SECONDS, ROLES, Entry, Kv

__all__ = (
    "CONFIRM_SECONDS",
    "RENEW_SECONDS",
    "Heard",
    "Lease",
    "LeaseKey",
    "LeaseTable",
    "Leases",
    "SeenLease",
)

RENEW_SECONDS = 3.0
"""Pause between two renewals: two may be lost, or a cluster may choose a new leader meanwhile."""

CONFIRM_SECONDS = 2.0
"""How long a claim is waited for; what nobody has been told by then was not taken."""

_log = structlog.get_logger()


class Lease(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is written into the bucket."""

    worker: str
    since: float
    """Unix time of the claim."""
    renewed: float
    """Unix time of this renewal."""
    state: str = "loading"
    """`loading` or `ready`."""
    group: Group | None = None
    """Where several workers carry the replica: who, and what. The lease is the head's."""


class LeaseKey(NamedTuple):
    """Replica `number`, from 0, of a model."""

    model: str
    number: int

    @property
    def key(self) -> str:
        """As the bucket names it."""
        return subjects.lease_key(self.model, self.number)


class SeenLease(NamedTuple):
    """A key of the bucket as one reader knows it."""

    lease: Lease | None
    """None: released."""
    revision: int
    seen: float
    """When the reader heard of this revision, by its own monotonic clock."""


class Heard(NamedTuple):
    """A write into the bucket."""

    key: LeaseKey
    lease: Lease | None
    revision: int
    news: bool
    """Whether it is more than a renewal."""


_decoder = msgspec.json.Decoder(Lease)
_encoder = msgspec.json.Encoder()


class LeaseTable:
    """All leases as heard so far. Pure; every `now` is a monotonic clock's."""

    def __init__(self) -> None:
        self._seen: dict[LeaseKey, SeenLease] = {}

    def hear(self, entry: Entry, now: float) -> "Heard | None":
        """Take note of a write; None if it is no lease, or older than what is known."""
        try:
            key = LeaseKey(*subjects.read_lease_key(entry.key))
            lease = None if entry.value is None else _decoder.decode(entry.value)
        except (ValueError, msgspec.DecodeError) as error:
            _log.warning("lease.unreadable", key=entry.key, reason=str(error))
            return None
        before = self._seen.get(key)
        if before is not None and before.revision >= entry.revision:
            return None
        known = None if before is None or now - before.seen > LEASE_SECONDS else before.lease
        self._seen[key] = SeenLease(lease, entry.revision, now)
        return Heard(key, lease, entry.revision, _told(known) != _told(lease))

    def forget_revisions(self) -> None:
        """The server was away: what it tells next counts, even if its numbers began anew."""
        self._seen = {key: seen._replace(revision=0) for key, seen in self._seen.items()}

    def holder(self, key: LeaseKey, now: float) -> Lease | None:
        """The live lease of a key."""
        seen = self._seen.get(key)
        return None if seen is None or now - seen.seen > LEASE_SECONDS else seen.lease

    def expected(self, key: LeaseKey, now: float) -> int:
        """The revision that a claim must find: 0 once the server has forgotten the key."""
        seen = self._seen.get(key)
        return 0 if seen is None or now - seen.seen > LEASE_SECONDS else seen.revision

    def live(self, now: float) -> Iterator[tuple[LeaseKey, Lease]]:
        """All live leases; those long expired are forgotten."""
        for key, seen in list(self._seen.items()):
            if now - seen.seen > LEASE_SECONDS:
                del self._seen[key]
            elif seen.lease is not None:
                yield key, seen.lease


class _Held(msgspec.Struct):
    since: float
    state: str
    group: Group | None = None
    revision: int = 0
    sent: tuple[float, float] = (0.0, 0.0)
    """The last write: its `renewed`, and the monotonic time before it."""
    written: float = 0.0
    """The same monotonic time of the last write that was seen to be taken."""


class _Claim(NamedTuple):
    held: _Held
    taken: "asyncio.Future[bool]"


class Leases:
    """One worker's leases: claimed, renewed, released."""

    def __init__(
        self,
        kv: Kv,
        worker: str,
        *,
        on_change: Callable[[], None],
        on_lost: Callable[[LeaseKey, str], None],
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        """Make them.

        Args:
            kv: the buckets.
            worker: who we are.
            on_change: told when any worker's lease is claimed, released, or changes hands.
            on_lost: told of a lease of ours that another worker holds, and who that is.
            clock: a monotonic clock, in seconds.
            wall: unix time, for others to read.
        """
        self.table = LeaseTable()
        self._kv = kv
        self._worker = worker
        self._on_change = on_change
        self._on_lost = on_lost
        self._clock = clock
        self._wall = wall
        self._held: dict[LeaseKey, _Held] = {}
        self._claimed: dict[LeaseKey, _Claim] = {}

    async def open(self) -> None:
        """Begin to follow the bucket; raises BusUnavailable."""
        await self._kv.follow(ROLES, self._hear)

    @property
    def held(self) -> frozenset[LeaseKey]:
        """Those that are ours."""
        return frozenset(self._held)

    def groups(self) -> Mapping[str, Group]:
        """Of all live leases of all workers, those that several carry; by their models."""
        live = self.table.live(self._clock())
        return {key.model: lease.group for key, lease in live if lease.group is not None}

    def sure(self, key: LeaseKey) -> bool:
        """Whether nobody else can hold it at this moment."""
        held = self._held.get(key)
        return held is not None and self._clock() - held.written < LEASE_SECONDS

    async def claim(
        self, key: LeaseKey, *, state: str = "loading", group: Group | None = None
    ) -> bool:
        """Try to get a lease; whether it is ours. Takes `CONFIRM_SECONDS` at most.

        Args:
            key: which.
            state: how far the model has come.
            group: of a replica that several workers carry.

        Raises:
            BusUnavailable: NATS is away.
        """
        if key in self._held:
            return True
        now = self._clock()
        if key in self._claimed or self.table.holder(key, now) is not None:
            return False
        claim = self._claimed[key] = _Claim(
            _Held(self._wall(), state, group), asyncio.get_running_loop().create_future()
        )
        try:
            await self._tell(key, claim.held, self.table.expected(key, now))
            async with asyncio.timeout(CONFIRM_SECONDS):
                return await claim.taken
        except TimeoutError:
            return False
        finally:
            del self._claimed[key]

    async def release(self, key: LeaseKey) -> None:
        """Give a lease back; another may claim it at once."""
        held = self._held.pop(key, None)
        if held is None:
            return
        try:
            await self._kv.tell(ROLES, key.key, None, held.revision)
        except BusUnavailable as error:
            # Then it expires by itself.
            _log.info("lease.release_untold", model=key.model, reason=str(error))

    def mark(self, model: str, state: str) -> bool:
        """Note how far a model of ours has come; whether that is news, which `renew` tells."""
        changed = False
        for key, held in self._held.items():
            if key.model == model and held.state != state:
                held.state = state
                changed = True
        return changed

    async def renew(self) -> None:
        """Renew all; to be called every `RENEW_SECONDS`. Raises BusUnavailable.

        What was renewed is known when the server tells of it; what was not by the time that the
        lease has run out is claimed anew, if nobody else has it.
        """
        now = self._clock()
        for key, held in list(self._held.items()):
            mine = now - held.written < LEASE_SECONDS
            await self._tell(key, held, held.revision if mine else 0)

    def reconnected(self) -> None:
        """NATS is back; the leases are to be renewed at once."""
        self.table.forget_revisions()

    async def _tell(self, key: LeaseKey, held: _Held, revision: int) -> None:
        held.sent = (self._wall(), self._clock())
        lease = Lease(self._worker, held.since, held.sent[0], held.state, held.group)
        await self._kv.tell(ROLES, key.key, _encoder.encode(lease), revision)

    def _hear(self, entry: Entry) -> None:
        heard = self.table.hear(entry, self._clock())
        if heard is None:
            return
        self._judge(heard)
        if heard.news:
            self._on_change()

    def _judge(self, heard: Heard) -> None:
        """What a write means for us."""
        key, lease = heard.key, heard.lease
        claim, held = self._claimed.get(key), self._held.get(key)
        if claim is not None and not claim.taken.done():
            ours = lease is not None and self._is(lease, claim.held)
            if ours:
                held = self._held[key] = claim.held
            claim.taken.set_result(ours)
        if held is None:
            return
        if lease is not None and not self._is(lease, held):
            del self._held[key]
            _log.warning("lease.lost", model=key.model, number=key.number, holder=lease.worker)
            self._on_lost(key, lease.worker)
            return
        held.revision = heard.revision
        if lease is not None and lease.renewed == held.sent[0]:
            held.written = held.sent[1]

    def _is(self, lease: Lease, held: _Held) -> bool:
        return lease.worker == self._worker and lease.since == held.since


def _told(lease: Lease | None) -> tuple[str, float, str] | None:
    return None if lease is None else (lease.worker, lease.since, lease.state)
