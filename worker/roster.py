"""The models that this worker serves: those its operator named, and those it took as roles.

A pinned model is listed for as long as the worker lives, also when it has failed. A role is started
when the worker has claimed it, and drained before it goes; one that fails goes at once, and is not
offered again for some time.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import msgspec
import structlog

from shared.presence import LoadableModel, ModelState
from worker.catalog import ModelSource
from worker.loadable import survey
from worker.memory_budget import MemoryBudget
from worker.preparing import ServingSettings
from worker.serving import Serving, Surroundings

__all__ = ("FAILED_SECONDS", "Roster")

FAILED_SECONDS = 300.0
"""How long a model that failed is not offered as a role."""

_log = structlog.get_logger()


class Roster:
    """Servings by their models' names, each with the task that runs it."""

    def __init__(
        self,
        pinned: Sequence[ModelSource],
        roles: Sequence[ModelSource],
        settings: ServingSettings,
        around: Surroundings,
        group: asyncio.TaskGroup,
        *,
        memory: int,
        on_failed: Callable[[str, str], None],
    ) -> None:
        """Make it, with nothing started.

        Args:
            pinned: models to serve whatever happens.
            roles: models that may be started and stopped; `survey` says which of them fit.
            settings: for all of them.
            around: what they share; its budget is for the pinned ones.
            group: runs them.
            memory: bytes for all of them together.
            on_failed: told the name of a model that cannot be served, and why.
        """
        self._pinned = tuple(pinned)
        self._roles = {source.name: source for source in roles}
        self._settings = settings
        self._around = around
        self._group = group
        self._memory = memory
        self._on_failed = on_failed
        self._servings: dict[str, Serving] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._loadable: tuple[LoadableModel, ...] = ()
        self._failed: dict[str, float] = {}

    def __iter__(self) -> Iterator[Serving]:
        return iter(tuple(self._servings.values()))

    def get(self, model: str) -> Serving | None:
        """The serving of a model, by its own name."""
        return self._servings.get(model)

    def is_pinned(self, model: str) -> bool:
        """Whether the operator named it."""
        return any(source.name == model for source in self._pinned)

    @property
    def tasks(self) -> tuple[asyncio.Task[None], ...]:
        """Those that run the servings."""
        return tuple(self._tasks.values())

    @property
    def able(self) -> tuple[LoadableModel, ...]:
        """What could be loaded, or is; without what has just failed."""
        now = time.monotonic()
        self._failed = {name: until for name, until in self._failed.items() if until > now}
        return tuple(model for model in self._loadable if model.name not in self._failed)

    def states(self) -> tuple[ModelState, ...]:
        """All models as beats tell of them."""
        return tuple(state for serving in self for state in serving.states())

    async def survey(self) -> None:
        """Find out what could be loaded: in a thread, for there may be hundreds of files."""
        sources = (*self._pinned, *self._roles.values())
        self._loadable = await asyncio.to_thread(survey, sources, self._settings, self._memory)
        self._around.on_change()

    def start_pinned(self) -> None:
        """Start the models that the operator named; they share the memory."""
        for source in self._pinned:
            self._start(Serving(source, self._settings, self._around, pinned=True))

    def start(self, model: str) -> bool:
        """Start a role; whether there is such a model, not started yet, and room for it."""
        source = self._roles.get(model)
        cost = next((known.memory for known in self.able if known.name == model), None)
        if source is None or cost is None or model in self._servings or cost > self._free():
            return False
        around = msgspec.structs.replace(self._around, budget=MemoryBudget(cost, 1))
        self._start(Serving(source, self._settings, around, memory=cost))
        return True

    async def stop(self, model: str) -> None:
        """Take nothing new for a role, let what runs come to its end, and unload it."""
        serving = self._servings.get(model)
        if serving is None or self.is_pinned(model):
            return
        serving.drain()
        self._around.on_change()
        await serving.idle()
        task = self._tasks.get(model)
        if task is not None:
            task.cancel()
            await asyncio.wait({task})
        self._around.on_change()

    def _free(self) -> int:
        return self._memory - sum(
            state.memory for serving in self for state in serving.states()[:1]
        )

    def _start(self, serving: Serving) -> None:
        self._servings[serving.name] = serving
        self._tasks[serving.name] = self._group.create_task(self._run(serving), name=serving.name)
        self._around.on_change()

    async def _run(self, serving: Serving) -> None:
        pinned = self.is_pinned(serving.name)
        try:
            await serving.run()
            if serving.failure:
                if not pinned:
                    self._failed[serving.name] = time.monotonic() + FAILED_SECONDS
                self._on_failed(serving.name, serving.failure)
        finally:
            if not pinned:
                serving.abandon(f"worker {self._around.bus.identity} does not serve it any more")
                with suppress(KeyError):
                    del self._servings[serving.name], self._tasks[serving.name]
                self._around.on_change()
