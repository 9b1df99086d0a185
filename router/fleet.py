"""The live view of the workers, from their beats.

Pure: beats and the clock are passed in, nothing is read or sent. A worker is dead after `EXPIRY`
seconds without a beat. Names of models are remembered for a while after their last worker left, so
that "nobody is there" can be told from "never heard of".
"""

from collections import OrderedDict
from typing import Literal

import msgspec

from shared.presence import Beat, ModelState

__all__ = ("EXPIRY", "Availability", "Fleet", "ModelView")

EXPIRY = 2.0
REMEMBERED = 1024

_STATE_ORDER = {"ready": 0, "draining": 1, "loading": 2, "failed": 3}

Availability = Literal["ready", "draining", "loading", "failed", "unavailable"]


class ModelView(msgspec.Struct, frozen=True):
    """One model over all workers, for `/v1/models`."""

    name: str
    state: Availability
    """The best that any worker says, or `unavailable` when no worker is left."""
    workers: int
    context: int
    created: int
    embeddings: bool


class _Seen(msgspec.Struct):
    beat: Beat
    at: float


class Fleet:
    """Workers, their models, and the names that were once served."""

    def __init__(self) -> None:
        self._workers: dict[str, _Seen] = {}
        self._remembered: OrderedDict[str, ModelState] = OrderedDict()

    def observe(self, beat: Beat, now: float) -> bool:
        """Take a beat into account; False if that worker has said goodbye.

        A beat older than the last one of the same process is ignored.
        """
        seen = self._workers.get(beat.worker)
        if (
            seen is not None
            and seen.beat.started == beat.started
            and beat.sequence < seen.beat.sequence
        ):
            return True
        if beat.state == "gone":
            self._workers.pop(beat.worker, None)
            return False
        self._workers[beat.worker] = _Seen(beat, now)
        for model in beat.models:
            if model.state == "ready":
                self._remember(model)
        return True

    def expire(self, now: float) -> list[str]:
        """Forget the workers that have fallen silent, and name them."""
        lost = [name for name, seen in self._workers.items() if now - seen.at > EXPIRY]
        for name in lost:
            del self._workers[name]
        return lost

    def alive(self, worker: str) -> bool:
        """Whether this worker's beats arrive."""
        return worker in self._workers

    def empty(self) -> bool:
        """Whether no worker is there at all."""
        return not self._workers

    def knows(self, model: str) -> bool:
        """Whether the model is or was served by anybody."""
        return model in self._remembered

    def candidates(self, model: str) -> list[str]:
        """The workers that serve the model now, the one with the most room first."""
        ranked = [
            (state.queued - state.free, state.kv_used, name)
            for name, seen in self._workers.items()
            if seen.beat.state not in ("draining", "standby")
            for state in seen.beat.models
            if state.name == model and state.state == "ready"
        ]
        return [name for _, _, name in sorted(ranked)]

    def served(self) -> list[str]:
        """Names of the models that at least one worker serves now."""
        return [view.name for view in self.models() if view.state == "ready"]

    def models(self) -> list[ModelView]:
        """Every known model, those that are ready first, then by name."""
        views = {name: self._view(name, state) for name, state in self._remembered.items()}
        for seen in self._workers.values():
            for state in seen.beat.models:
                if state.name not in views:
                    views[state.name] = self._view(state.name, state)
        return sorted(views.values(), key=lambda view: (view.state != "ready", view.name))

    def model(self, name: str) -> ModelView | None:
        """One model, if it is known."""
        return next((view for view in self.models() if view.name == name), None)

    def _view(self, name: str, last: ModelState) -> ModelView:
        live = [
            state
            for seen in self._workers.values()
            for state in seen.beat.models
            if state.name == name
        ]
        best = min(live, key=lambda state: _STATE_ORDER[state.state], default=None)
        return ModelView(
            name=name,
            state=best.state if best else "unavailable",
            workers=sum(state.state == "ready" for state in live),
            context=max((state.context for state in live), default=last.context),
            created=min((s.created for s in live if s.created), default=last.created),
            embeddings=(best or last).embeddings,
        )

    def _remember(self, model: ModelState) -> None:
        self._remembered[model.name] = model
        self._remembered.move_to_end(model.name)
        while len(self._remembered) > REMEMBERED:
            self._remembered.popitem(last=False)
