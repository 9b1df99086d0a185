"""Presence: what workers and routers tell of themselves, some times a second.

Beats are JSON, so that `nats sub` shows them. What a worker could load is an array a model, which
keeps a beat small however many models a host has: its fields may only be appended. Decoders ignore
what they do not know, so that versions can be mixed during an upgrade.
"""

from typing import Literal

import msgspec

from shared.bounds import Count
from shared.decoding import decoded
from shared.groups import SplitModel, StageState

__all__ = (
    "Beat",
    "LoadableModel",
    "ModelState",
    "RoleChange",
    "RouterBeat",
    "decode_beat",
    "decode_router_beat",
    "encode_beat",
)


class ModelState(msgspec.Struct, frozen=True, omit_defaults=True):
    """One model on one worker; told once under each of its names."""

    name: str
    state: Literal["loading", "ready", "draining", "failed"]
    slots: int = 0
    free: int = 0
    queued: int = 0
    queue_limit: int = 0
    context: int = 0
    """Tokens a single sequence may use."""
    kv_used: float = 0.0
    """0 to 1."""
    tokens_per_second: float = 0.0
    embeddings: bool = True
    size: int = 0
    """Bytes of the file."""
    created: int = 0
    """Unix time of the file."""
    detail: str = ""
    """Progress while loading, the reason when failed, advice when ready."""
    drafted: int = 0
    accepted: int = 0
    cached_tokens: int = 0
    prompt_tokens: int = 0
    drafted_at: tuple[int, ...] = ()
    """Draft tokens verified, by their position in the draft."""
    accepted_at: tuple[int, ...] = ()
    gain: float = 1.0
    """Tokens/s while speculating over what would have come without."""
    restarts: int = 0
    memory: int = 0
    """Bytes set aside for it, its draft included; 0: not known yet."""
    busy: int = 0
    """Attempts that run or wait."""
    since: float = 0.0
    """Unix time since which it is in this state."""
    last_use: float = 0.0
    """Unix time of the last moment at which an attempt was in; 0: none so far."""
    pinned: bool = False
    """The operator named it: the worker serves it whatever the demand is."""
    alias_of: str = ""
    """The model's own name, where `name` is another one for it."""


class LoadableModel(msgspec.Struct, frozen=True, array_like=True):
    """A model that a worker could load, or has loaded: its file is at hand and fits its memory."""

    name: str
    memory: int
    """Bytes it takes of the worker's `memory_budget`, by the header's estimate."""
    context: int
    """Tokens a single sequence may use, unless memory is short when it is loaded."""
    slots: int
    size: int
    """Bytes of the file."""
    created: int
    """Unix time of the file."""
    embeddings: bool = True
    aliases: tuple[str, ...] = ()


class RoleChange(msgspec.Struct, frozen=True):
    """What a worker did about its role, and why."""

    at: float
    """Unix time."""
    model: str
    action: Literal["promote", "demote", "lost", "fail"]
    """`lost`: another worker holds what was this one's lease. `fail`: it could not be served."""
    reason: str


class Beat(msgspec.Struct, frozen=True, omit_defaults=True):
    """A worker's presence, twice a second and at once on a change of state."""

    worker: str
    state: Literal["standby", "loading", "ready", "draining", "gone"]
    sequence: int
    models: tuple[ModelState, ...] = ()
    host: str = ""
    version: str = ""
    started: float = 0.0
    memory_total: int = 0
    """Bytes of main memory that the worker's host (or container) has."""
    memory_used: int = 0
    able: tuple[LoadableModel, ...] = ()
    """Sorted by name."""
    parts: tuple[SplitModel, ...] = ()
    """Models of which it could carry a part only; sorted by name."""
    stages: tuple[StageState, ...] = ()
    """What it carries of models that several workers share."""
    hop: float = 0.0
    """Seconds to its NATS server and back."""
    memory_budget: int = 0
    """Bytes that the worker may use for all its models together; 0: not known yet."""
    changes: tuple[RoleChange, ...] = ()
    """The last few, the oldest first."""
    dropped: Count = 0
    """Messages that it could not use, since it began."""
    losses: Count = 0
    """How often it has lost its connection to NATS: nothing that it was asked before can be
    answered any more."""
    tasks: Count = 0
    """Of its event loop; what leaks shows here first."""


class RouterBeat(msgspec.Struct, frozen=True, omit_defaults=True):
    """A router's presence, once a second."""

    router: str
    sequence: int
    state: Literal["ready", "draining", "gone"] = "ready"
    in_flight: int = 0
    requests: int = 0
    url: str = ""
    version: str = ""
    started: float = 0.0


_json = msgspec.json.Encoder()
_beat = msgspec.json.Decoder(Beat)
_router_beat = msgspec.json.Decoder(RouterBeat)


def encode_beat(beat: Beat | RouterBeat) -> bytes:
    """Encode a beat as JSON."""
    return _json.encode(beat)


def decode_beat(data: bytes) -> Beat:
    """Decode a worker's beat; raises msgspec.DecodeError."""
    return decoded(_beat, data)


def decode_router_beat(data: bytes) -> RouterBeat:
    """Decode a router's beat; raises msgspec.DecodeError."""
    return decoded(_router_beat, data)
