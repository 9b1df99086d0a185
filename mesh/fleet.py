"""What can be heard of a running system: its beats, taken together.

Used by `mesh up` to know when it is ready and by the commands that show the state. Pure; the bus
only calls `hear` and `hear_router`.
"""

import time
from collections.abc import Callable

import msgspec

from shared.groups import SplitModel
from shared.presence import Beat, ModelState, RouterBeat, decode_beat, decode_router_beat

__all__ = ("Fleet", "ModelView", "Snapshot", "WorkerOfModel")


class WorkerOfModel(msgspec.Struct, frozen=True):
    """One worker's part in a model."""

    worker: str
    state: str
    slots: int
    free: int
    queued: int
    context: int
    tokens_per_second: float
    detail: str


class ModelView(msgspec.Struct, frozen=True):
    """A model over all its workers."""

    name: str
    state: str
    """The best of its workers' states."""
    context: int
    """The smallest of its ready workers', else of all."""
    size: int
    embeddings: bool
    workers: tuple[WorkerOfModel, ...]


class Snapshot(msgspec.Struct, frozen=True):
    """The system at one moment, as `mesh status --json` prints it."""

    workers: tuple[Beat, ...]
    routers: tuple[RouterBeat, ...]
    models: tuple[ModelView, ...]
    unread: int = 0
    """Beats that this version cannot decode."""


_RANK = {"ready": 0, "loading": 1, "draining": 2, "failed": 3}


class Fleet:
    """The newest beat of every worker and router."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.workers: dict[str, Beat] = {}
        self.routers: dict[str, RouterBeat] = {}
        self._clock = clock
        self._heard: dict[str, float] = {}
        self.unread = 0
        """Beats that this version cannot decode."""

    def hear(self, data: bytes) -> None:
        """Take a worker's beat, unless it is older than what is known."""
        try:
            beat = decode_beat(data)
        except msgspec.DecodeError:
            self.unread += 1
            return
        known = self.workers.get(beat.worker)
        if known and beat.started == known.started and beat.sequence < known.sequence:
            return
        if beat.state == "gone":
            self.workers.pop(beat.worker, None)
        else:
            self.workers[beat.worker] = beat
            self._heard[beat.worker] = self._clock()

    def hear_router(self, data: bytes) -> None:
        """Take a router's beat, as `hear` does a worker's."""
        try:
            beat = decode_router_beat(data)
        except msgspec.DecodeError:
            self.unread += 1
            return
        known = self.routers.get(beat.router)
        if known and beat.started == known.started and beat.sequence < known.sequence:
            return
        if beat.state == "gone":
            self.routers.pop(beat.router, None)
        else:
            self.routers[beat.router] = beat
            self._heard[beat.router] = self._clock()

    def forget_silent(self, seconds: float) -> None:
        """Drop those that have said nothing for so long."""
        since = self._clock() - seconds
        silent = {name for name, heard in self._heard.items() if heard < since}
        for name in silent:
            self.workers.pop(name, None)
            self.routers.pop(name, None)
            del self._heard[name]

    def model_state(self, worker: str, model: str) -> ModelState | None:
        """What a worker says of a model."""
        beat = self.workers.get(worker)
        if beat is None:
            return None
        return next((state for state in beat.models if state.name == model), None)

    def served(self, model: str) -> bool:
        """Whether some worker serves a model."""
        return any(
            state.name == model and state.state == "ready"
            for beat in self.workers.values()
            for state in beat.models
        )

    def part(self, worker: str, model: str) -> SplitModel | None:
        """What a worker says of a model of which it could carry a part only."""
        beat = self.workers.get(worker)
        if beat is None:
            return None
        return next((part for part in beat.parts if part.name == model), None)

    def failures(self, worker: str, model: str) -> tuple[str, ...]:
        """Why a worker could not serve a model of late."""
        beat = self.workers.get(worker)
        if beat is None:
            return ()
        return tuple(c.reason for c in beat.changes if c.model == model and c.action == "fail")

    def snapshot(self) -> Snapshot:
        """Everything, in the order of the names."""
        workers = tuple(self.workers[name] for name in sorted(self.workers))
        routers = tuple(self.routers[name] for name in sorted(self.routers))
        return Snapshot(
            workers=workers, routers=routers, models=_models(workers), unread=self.unread
        )


def _models(workers: tuple[Beat, ...]) -> tuple[ModelView, ...]:
    states: dict[str, list[tuple[str, ModelState]]] = {}
    for beat in workers:
        for state in beat.models:
            states.setdefault(state.name, []).append((beat.worker, state))
    return tuple(_model(name, states[name]) for name in sorted(states))


def _model(name: str, states: list[tuple[str, ModelState]]) -> ModelView:
    ready = [state for _, state in states if state.state == "ready"]
    counted = ready or [state for _, state in states]
    return ModelView(
        name=name,
        state=min((state.state for _, state in states), key=lambda state: _RANK[state]),
        context=min(state.context for state in counted),
        size=max(state.size for state in counted),
        embeddings=any(state.embeddings for state in counted),
        workers=tuple(
            WorkerOfModel(
                worker=worker,
                state=state.state,
                slots=state.slots,
                free=state.free,
                queued=state.queued,
                context=state.context,
                tokens_per_second=state.tokens_per_second,
                detail=state.detail,
            )
            for worker, state in states
        ),
    )
