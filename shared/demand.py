"""What routers know of the demand for each model, and how their knowledge is added up.

Pure: the clock is passed in, as unix time. Each router tells only of its own requests, one
`DemandEntry` a model; a reader brings all entries to one moment and adds them. Counts decay with a
half-life, so that no entry ever has to be taken back, and nothing is lost when a router restarts:
its last entry stays, less decay, and a successor of the same name goes on from it.

Requests in flight are told as two means over time (`load`, `sustained`), exact between changes: a
reader who knows how many run computes the mean of a later moment by himself. Thus an entry need
not be sent anew while nothing changes. Times of other hosts may lie ahead of ours: an entry from
the future is taken as it is, it neither grows nor shrinks.
"""

import math
from collections.abc import Iterable

import msgspec

__all__ = (
    "HALF_LIFE",
    "LOAD_HALF_LIFE",
    "REFRESH",
    "STALE",
    "SUSTAINED_HALF_LIFE",
    "Demand",
    "DemandEntry",
    "brought_to",
    "decode_entry",
    "encode_entry",
    "total",
)

HALF_LIFE = 30.0
"""Seconds in which counts of requests and tokens halve."""
LOAD_HALF_LIFE = 10.0
"""Seconds in which `load` comes half way to a new number of requests in flight."""
SUSTAINED_HALF_LIFE = 120.0
"""The same for `sustained`."""
REFRESH = 5.0
"""Seconds after which a router tells again of a model that is in use."""
STALE = 3 * REFRESH
"""Seconds after which an entry that was not renewed counts as its router's last word: what waited
and ran then does no more."""


class DemandEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One router's demand for one model at the moment `at`."""

    model: str
    router: str
    at: float
    """Unix time."""
    requests: float = 0.0
    """Requests that have come, decayed with `HALF_LIFE`."""
    tokens: float = 0.0
    """Tokens generated, decayed likewise."""
    waiting: int = 0
    """Requests that no worker has taken: held, or about to be refused."""
    waiting_since: float = 0.0
    """Unix time since which some wait without a break; 0: none does."""
    running: int = 0
    """Requests that workers have taken and not finished."""
    load: float = 0.0
    """Mean of `running`, weighted with `LOAD_HALF_LIFE`."""
    sustained: float = 0.0
    """Mean of `running`, weighted with `SUSTAINED_HALF_LIFE`."""
    last_use: float = 0.0
    """Unix time at which a request last came or ended, `at` while one is in; 0: never."""


class Demand(msgspec.Struct, frozen=True):
    """All routers' demand for one model at one moment; fields as in `DemandEntry`."""

    requests: float = 0.0
    tokens: float = 0.0
    waiting: int = 0
    waiting_since: float = 0.0
    running: int = 0
    load: float = 0.0
    sustained: float = 0.0
    last_use: float = 0.0


def brought_to(entry: DemandEntry, now: float) -> DemandEntry:
    """The entry as it would read at `now` if nothing had happened since.

    After `STALE` seconds what ran has ended and what waited has left. An entry from the future is
    returned as it is.
    """
    age = now - entry.at
    if age <= 0:
        return entry
    fade = math.exp2(-age / HALF_LIFE)
    told = min(age, STALE)
    alive = age <= STALE
    return DemandEntry(
        entry.model,
        entry.router,
        now,
        entry.requests * fade,
        entry.tokens * fade,
        entry.waiting if alive else 0,
        entry.waiting_since if alive else 0.0,
        entry.running if alive else 0,
        _mean(entry.load, entry.running, told, age, LOAD_HALF_LIFE),
        _mean(entry.sustained, entry.running, told, age, SUSTAINED_HALF_LIFE),
        entry.at + told if entry.running or entry.waiting else entry.last_use,
    )


def total(entries: Iterable[DemandEntry], now: float) -> dict[str, Demand]:
    """All entries added up at one moment, by model.

    The sums are exact (correctly rounded), hence the same in whatever order entries come. Of two
    entries of one router for one model both count: it is for the caller to keep the last of each.
    """
    grouped: dict[str, list[DemandEntry]] = {}
    for entry in entries:
        grouped.setdefault(entry.model, []).append(brought_to(entry, now))
    return {model: _sum(found, now) for model, found in grouped.items()}


def _sum(found: list[DemandEntry], now: float) -> Demand:
    since = [entry.waiting_since for entry in found if entry.waiting]
    return Demand(
        math.fsum(entry.requests for entry in found),
        math.fsum(entry.tokens for entry in found),
        sum(entry.waiting for entry in found),
        min(now, *since) if since else 0.0,
        sum(entry.running for entry in found),
        math.fsum(entry.load for entry in found),
        math.fsum(entry.sustained for entry in found),
        min(now, max(entry.last_use for entry in found)),
    )


def _mean(mean: float, running: int, told: float, age: float, half_life: float) -> float:
    """The mean after `age` seconds, of which `running` ran for the first `told`."""
    mean = running + (mean - running) * math.exp2(-told / half_life)
    return mean if told == age else mean * math.exp2((told - age) / half_life)


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(DemandEntry)


def encode_entry(entry: DemandEntry) -> bytes:
    """An entry as JSON, so that `nats kv get` shows it."""
    return _encoder.encode(entry)


def decode_entry(data: bytes) -> DemandEntry:
    """Undo `encode_entry`; raises msgspec.DecodeError."""
    return _decoder.decode(data)
