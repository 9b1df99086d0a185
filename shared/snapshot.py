"""What the placement function looks at: workers, leases, settings and demand at one moment.

Plain data. Whoever decides builds it from beats, the buckets and the clock; the simulation makes it
up. Models go by their canonical names, never by aliases. Bytes are those that a model takes of its
worker's budget.
"""

from collections.abc import Mapping
from typing import Literal

import msgspec

from shared.demand import Demand
from shared.groups import SplitModel, StageState

__all__ = ("DEFAULT_SLOTS", "Holding", "LeaseView", "ModelSettings", "Snapshot", "WorkerView")

DEFAULT_SLOTS = 8


class ModelSettings(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an operator wants of one model."""

    model: str
    minimum: int = 0
    """Replicas kept even while nobody asks for the model."""
    maximum: int = 0
    """Replicas at most; 0: as many as demand asks for. `minimum` and `pinned` go before it."""
    priority: int = 0
    """A higher one may have an idle model of a lower one evicted, and its second replicas."""
    pinned: tuple[str, ...] = ()
    """Workers that hold it always, if they can."""


class Holding(msgspec.Struct, frozen=True, omit_defaults=True):
    """One model on one worker, as the worker tells it."""

    model: str
    state: Literal["loading", "ready", "draining"]
    since: float = 0.0
    """Unix time since which it is in this state."""
    busy: int = 0
    """Requests that run or wait there."""
    memory: int = 0
    """Bytes."""
    pinned: bool = False
    """The worker's operator named it: it stays whatever is decided here."""


class WorkerView(msgspec.Struct, frozen=True, omit_defaults=True):
    """One worker."""

    name: str
    memory: int
    """Bytes for all models together."""
    able: Mapping[str, int] = {}
    """Bytes of each model that it could load. One that has just failed there is left out for a
    while, by the worker itself. Workers that are alike may share one mapping."""
    holds: tuple[Holding, ...] = ()
    parts: tuple[SplitModel, ...] = ()
    """Models of which it could carry a part only."""
    stages: tuple[StageState, ...] = ()
    """What it carries of models that several workers share."""
    hop: float = 0.0
    """Seconds to its NATS server and back."""
    started: float = 0.0
    """Unix time, by its own clock, at which its process began: tells its lives apart."""
    open: bool = True
    """Whether it takes roles; not while it shuts down. What it holds then counts no more."""


class LeaseView(msgspec.Struct, frozen=True, omit_defaults=True):
    """A live lease: replica number `replica` of a model is this worker's."""

    model: str
    replica: int
    worker: str
    state: Literal["loading", "ready"] = "ready"
    """Believed only where the worker itself is out of sight."""
    since: float = 0.0
    """Unix time of the claim, or of becoming ready."""


class Snapshot(msgspec.Struct, frozen=True):
    """All that a decision depends on, besides the moment."""

    workers: tuple[WorkerView, ...]
    """Those that one sees, oneself among them; not all need to be known."""
    leases: tuple[LeaseView, ...] = ()
    settings: Mapping[str, ModelSettings] = {}
    """By model; what is missing has none."""
    demand: Mapping[str, Demand] = {}
    """By model, as summed up at the moment of the decision."""
    slots: Mapping[str, int] = {}
    """Sequences that a replica of a model runs at once; `DEFAULT_SLOTS` where it is missing."""
