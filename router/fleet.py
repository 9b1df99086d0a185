"""The live view of the workers, from their beats.

Pure: beats and the clock are passed in, nothing is read or sent. A worker is dead after `EXPIRY`
seconds without a beat. Names of models are remembered for a while after their last worker left, so
that "nobody is there" can be told from "never heard of".
"""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Literal

import msgspec

from shared.distance import Distances
from shared.groups import SplitModel
from shared.presence import Beat, LoadableModel, ModelState
from shared.routing import Pool, Routing

__all__ = ("EXPIRY", "Availability", "Fleet", "ModelView")

EXPIRY = 2.0
REMEMBERED = 1024
MOST_NAMES = 4096
"""Names and aliases of models that workers could load."""

Availability = Literal["ready", "draining", "loading", "loadable", "failed", "unavailable"]
_ORDER: tuple[Availability, ...] = (
    "ready",
    "draining",
    "loading",
    "loadable",
    "failed",
    "unavailable",
)


class ModelView(msgspec.Struct, frozen=True):
    """One model over all workers, for `/v1/models`."""

    name: str
    state: Availability
    """The best that any worker says; `loadable`: none serves it, but one could; `unavailable`: it
    was served once, and no worker is left that could."""
    workers: int
    context: int
    created: int
    embeddings: bool
    size: int = 0


class _Seen(msgspec.Struct):
    beat: Beat
    at: float
    ready: frozenset[str]
    able: dict[str, LoadableModel]
    """By name and by alias."""


class Fleet:
    """Workers, their models, and the names that were once served."""

    def __init__(self, distances: Distances | None = None, routing: Routing | None = None) -> None:
        self.distances = Distances() if distances is None else distances
        self._routing = routing
        self._workers: dict[str, _Seen] = {}
        self._pools: dict[str, Pool] = {}
        self._remembered: OrderedDict[str, ModelState] = OrderedDict()
        self._own_names: dict[str, str] = {}
        """By name and by alias; kept when the last worker has left, so that counts match."""

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
            self._drop(beat.worker)
            return False
        serves = beat.state not in ("draining", "standby")
        ready: list[str] = []
        for model in beat.models:
            if model.state != "ready":
                continue
            self._remember(model)
            if model.alias_of:
                self._own_names[model.name] = model.alias_of
            if serves:
                ready.append(model.name)
                self._offer(beat.worker, model)
        names = frozenset(ready)
        if seen is not None and (seen.beat.able, seen.beat.parts) == (beat.able, beat.parts):
            able = seen.able
        else:
            able = self._learn(beat)
        if seen is not None:
            self._withdraw(beat.worker, seen.ready - names)
        self._workers[beat.worker] = _Seen(beat, now, names, able)
        return True

    def expire(self, now: float) -> list[str]:
        """Forget the workers that have fallen silent, and name them."""
        lost = [name for name, seen in self._workers.items() if now - seen.at > EXPIRY]
        for name in lost:
            self._drop(name)
        return lost

    def reconnected(self, now: float) -> None:
        """Beats could not come for a while: their time begins anew."""
        for seen in self._workers.values():
            seen.at = now

    def beats(self) -> Iterator[Beat]:
        """What each worker said last."""
        return (seen.beat for seen in self._workers.values())

    def workers(self) -> list[str]:
        """The workers whose beats arrive."""
        return list(self._workers)

    def alive(self, worker: str) -> bool:
        """Whether this worker's beats arrive."""
        return worker in self._workers

    def life(self, worker: str) -> tuple[float, int] | None:
        """When its process began, as it says (Unix time), and how often it has lost NATS since.

        None: it is not there.
        """
        seen = self._workers.get(worker)
        return None if seen is None else (seen.beat.started, seen.beat.losses)

    def empty(self) -> bool:
        """Whether no worker is there at all."""
        return not self._workers

    def knows(self, model: str) -> bool:
        """Whether the model is or was served by anybody, or could be."""
        return model in self._remembered or model in self._own_names

    def pool(self, model: str) -> Pool | None:
        """The workers that serve the model now; None: there are none."""
        return self._pools.get(model)

    def canonical(self, model: str) -> tuple[str, bool]:
        """The model's own name, of which this may be an alias, and whether anybody knows it."""
        name = self._own_names.get(model)
        if name is None:
            return model, model in self._remembered
        return name, True

    def loadable(self, model: str) -> LoadableModel | None:
        """What a worker says that could load the model of this name or alias."""
        found = (seen.able.get(model) for seen in self._workers.values())
        return next((able for able in found if able is not None), None)

    def loading(self, model: str) -> list[ModelState]:
        """What the workers say that are loading it."""
        return [state for state in self._states(model) if state.state == "loading"]

    def hopeful(self, model: str) -> bool:
        """Whether a worker loads it, or could and has not failed to."""
        for seen in self._workers.values():
            states = {state.state for state in seen.beat.models if state.name == model}
            if "loading" in states or (model in seen.able and "failed" not in states):
                return True
        return False

    def failure(self, model: str) -> str:
        """Why a worker cannot serve it; empty: none says so."""
        states = [state.detail for state in self._states(model) if state.state == "failed"]
        return next(iter([*states, *self._missing(model)]), "")

    def served(self) -> list[str]:
        """Names of the models that at least one worker serves now."""
        return sorted(self._pools)

    def models(self) -> list[ModelView]:
        """Every known model, those that are ready first, then by name."""
        states: dict[str, list[ModelState]] = {name: [] for name in self._remembered}
        able: dict[str, LoadableModel] = {}
        for seen in self._workers.values():
            for state in seen.beat.models:
                states.setdefault(state.name, []).append(state)
            for name, model in seen.able.items():
                states.setdefault(name, [])
                able.setdefault(name, model)
        views = [self._view(name, live, able.get(name)) for name, live in states.items()]
        return sorted(views, key=lambda view: (view.state != "ready", view.name))

    def model(self, name: str) -> ModelView | None:
        """One model, if it is known."""
        live = self._states(name)
        able = self.loadable(name)
        if not (live or able or name in self._remembered or self._missing(name)):
            return None
        return self._view(name, live, able)

    def _states(self, model: str) -> list[ModelState]:
        return [
            state
            for seen in self._workers.values()
            for state in seen.beat.models
            if state.name == model
        ]

    def _missing(self, model: str) -> list[str]:
        """Why workers could not carry it together, as they say."""
        return [
            part.missing
            for seen in self._workers.values()
            for part in seen.beat.parts
            if part.missing and model in (part.name, *part.aliases)
        ]

    def _view(self, name: str, live: list[ModelState], able: LoadableModel | None) -> ModelView:
        best = min(live, key=lambda state: _ORDER.index(state.state), default=None)
        last = best or self._remembered.get(name)
        state: Availability = best.state if best else "unavailable"
        if able is not None and _ORDER.index("loadable") < _ORDER.index(state):
            state = "loadable"
        contexts = [s.context for s in live if s.context]
        created = [s.created for s in live if s.created]
        if able is not None:
            contexts, created = contexts or [able.context], created or [able.created]
        if last is not None:
            contexts, created = contexts or [last.context], created or [last.created]
        return ModelView(
            name=name,
            state=state,
            workers=sum(state.state == "ready" for state in live),
            context=max(contexts, default=0),
            created=min(created, default=0),
            embeddings=able.embeddings
            if last is None and able
            else last is None or last.embeddings,
            size=max([s.size for s in live] + ([able.size] if able else []), default=0),
        )

    def _offer(self, worker: str, model: ModelState) -> None:
        pool = self._pools.get(model.name)
        if pool is None:
            pool = self._pools[model.name] = Pool(self.distances, self._routing)
        load = model.slots - model.free + model.queued
        pool.update(worker, slots=model.slots, load=load, context=model.context)

    def _withdraw(self, worker: str, models: frozenset[str]) -> None:
        for name in models:
            pool = self._pools[name]
            pool.remove(worker)
            if not len(pool):
                del self._pools[name]

    def _drop(self, worker: str) -> None:
        seen = self._workers.pop(worker, None)
        if seen is not None:
            self._withdraw(worker, seen.ready)
            self.distances.forget(worker)

    def _remember(self, model: ModelState) -> None:
        self._remembered[model.name] = model
        self._remembered.move_to_end(model.name)
        while len(self._remembered) > REMEMBERED:
            self._remembered.popitem(last=False)

    def _learn(self, beat: Beat) -> dict[str, LoadableModel]:
        """What could be loaded there, or together with others, by all its names."""
        named: dict[str, LoadableModel] = {}
        for part in beat.parts:
            for name in (part.name, *part.aliases):
                self._own_names[name] = part.name
                if not part.missing:
                    named[name] = _carried(part)
        named |= {name: model for model in beat.able for name in (model.name, *model.aliases)}
        for name, model in named.items():
            self._own_names[name] = model.name
        while len(self._own_names) > MOST_NAMES:
            del self._own_names[next(iter(self._own_names))]
        return named


def _carried(part: SplitModel) -> LoadableModel:
    """A model that several workers can carry, as one that could be loaded."""
    return LoadableModel(
        name=part.name,
        memory=0,
        context=part.context,
        slots=part.slots,
        size=part.size,
        created=part.created,
        embeddings=False,
        aliases=part.aliases,
    )
