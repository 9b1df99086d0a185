"""The models that this worker serves: those its operator named, and those it took as roles.

A pinned model is listed for as long as the worker lives, also when it has failed. A role is started
when the worker has claimed it, and drained before it goes; one that fails goes at once, and is not
offered again for some time. A model that is too large for this worker is started as the head of a
group, when the worker has claimed that; pinned or not, it goes when the group is over.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import msgspec
import structlog

from shared.groups import Group, SplitModel, StageState
from shared.model_shape import ModelShape
from shared.presence import LoadableModel, ModelState
from shared.sizes import format_size
from worker.catalog import ModelSource
from worker.kept_heads import KeptHeads
from worker.loadable import survey
from worker.memory_budget import MemoryBudget
from worker.part import draft_of_head, place_in, prepare_part
from worker.preparing import Prepared, ServingSettings, prepare, tell_draft
from worker.serving import Preparing, Serving
from worker.split_source import SplitSource
from worker.stages import Kind, Stages, kind_of
from worker.surroundings import Surroundings

__all__ = ("FAILED_SECONDS", "Roster")

FAILED_SECONDS = 300.0
"""How long a model that failed is not offered as a role."""

REST_SECONDS = 2.0
"""How long a model is not tried again as a group that never came about; doubled each time."""
MOST_REST_SECONDS = 60.0

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
        nats: str,
        on_failed: Callable[[str, str], None],
    ) -> None:
        """Make it, with nothing started.

        Args:
            pinned: models to serve whatever happens.
            roles: models that may be started and stopped; `survey` says which of them fit.
            settings: for all of them.
            around: what they share.
            group: runs them.
            memory: bytes for all of them together.
            nats: this worker's URL of the server.
            on_failed: told the name of a model that cannot be served, and why.
        """
        self._pinned = tuple(pinned)
        self._roles = {source.name: source for source in roles}
        self._settings = settings
        self._around = around
        self._group = group
        self._memory = memory
        self._budget = MemoryBudget(memory, len(self._pinned))
        self._nats = nats
        self._on_failed = on_failed
        self._servings: dict[str, Serving] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._loadable: tuple[LoadableModel, ...] = ()
        self._split: dict[str, SplitSource] = {}
        self._missing: dict[str, str] = {}
        self._failed: dict[str, float] = {}
        self._failures: dict[str, str] = {}
        self._in_vain: dict[str, int] = {}
        self._heads: dict[str, Kind] = {}
        self._kept = KeptHeads()
        self._groups: Callable[[], Mapping[str, Group]] = dict
        self.stages = Stages(
            around.bus.identity,
            nats,
            settings,
            groups=lambda: self._groups(),
            source=self._split.get,
            free=self._free,
            make_room=self._drop_kept,
            stopping=around.stopping,
            on_change=self._on_stage,
        )

    def __iter__(self) -> Iterator[Serving]:
        return iter(tuple(self._servings.values()))

    def get(self, model: str) -> Serving | None:
        """The serving of a model, by its own name."""
        return self._servings.get(model)

    def is_pinned(self, model: str) -> bool:
        """Whether the operator named it, and this worker holds it alone."""
        return model not in self._split and any(s.name == model for s in self._pinned)

    @property
    def tasks(self) -> tuple[asyncio.Task[None], ...]:
        """Those that run the servings."""
        return (*self._tasks.values(), *self._kept.tasks)

    @property
    def able(self) -> tuple[LoadableModel, ...]:
        """What could be loaded, or is; without what has just failed."""
        resting = self._resting()
        return tuple(model for model in self._loadable if model.name not in resting)

    @property
    def parts(self) -> tuple[SplitModel, ...]:
        """Of what it could carry a part."""
        pinned = {source.name for source in self._pinned}
        resting = self._resting()
        return tuple(
            split.told(
                pinned=name in pinned,
                missing=(self._failures if name in resting else self._missing).get(name, ""),
            )
            for name, split in self._split.items()
        )

    @property
    def shapes(self) -> Mapping[str, ModelShape]:
        """Of the models that it could carry a part of."""
        return {name: split.shape for name, split in self._split.items()}

    def states(self) -> tuple[ModelState, ...]:
        """All models as beats tell of them."""
        return tuple(state for serving in self for state in serving.states())

    def stage_states(self) -> tuple[StageState, ...]:
        """Its parts of models that several workers share, as beats tell of them."""
        heads = tuple(
            StageState(group.id, model, group.head.start, group.head.stop, 0, serving.state)
            for model, group in self._groups().items()
            if group.head.worker == self._around.bus.identity
            and (serving := self._servings.get(model)) is not None
        )
        return (*self.stages.states(), *heads)

    def note_missing(self, model: str, why: str) -> None:
        """Tell others why a model cannot be carried; empty: it can."""
        if self._missing.get(model, "") != why:
            self._missing[model] = why
            if why:
                _log.warning("model.not_carried", model=model, reason=why)
            self._around.on_change()

    def follow(self, groups: Callable[[], Mapping[str, Group]]) -> None:
        """Say where the groups of live leases, by their models, are to be had."""
        self._groups = groups

    async def survey(self) -> None:
        """Find out what could be loaded: in a thread, for there may be hundreds of files."""
        sources = (*self._pinned, *self._roles.values())
        named = {source.name for source in self._pinned}
        found = await asyncio.to_thread(survey, sources, self._settings, self._memory, named)
        self._loadable = found.whole
        for split in found.split:
            self._split[split.source.name] = split
            _log.warning(
                "model.waits_for_others",
                model=split.source.name,
                size=format_size(split.header.size),
                memory=format_size(self._memory),
                reason="it is too large for this worker, which may carry a part of it",
            )
        self._around.on_change()

    def start_pinned(self) -> None:
        """Start the models that the operator named; they share the memory.

        Those that `survey` has found too large for it wait for a group.
        """
        for source in self._pinned:
            if source.name in self._split:
                self._budget.waive()
            else:
                preparing = self._whole(source, self._budget)
                self._start(Serving(source, self._settings, self._around, preparing, pinned=True))

    def start_group(self, model: str, group: Group) -> bool:
        """Start as the head of a group; whether there is such a model, and room for its part."""
        split = self._split.get(model)
        memory = group.head.memory
        if split is None or model in self._servings or memory > self._free():
            return False
        kind = self._heads[model] = kind_of(model, group, group.head)
        if self._rejoin(model, group, kind):
            return True
        self._drop_kept()

        async def preparing(*, tell: Callable[[str], None]) -> Prepared:
            config = await prepare_part(
                split,
                self._settings,
                group,
                worker=self._around.bus.identity,
                nats=self._nats,
                stopping=self._around.stopping,
                tell=tell,
            )
            draft = await draft_of_head(
                split, self._settings, group, stopping=self._around.stopping, tell=tell
            )
            taken = memory
            if draft is not None:
                # What the part takes is not free any more.
                granted = draft.memory <= self._free()
                tell_draft(split.source, draft.header, granted)
                if granted:
                    config = msgspec.structs.replace(config, draft=draft.header.path)
                    taken += draft.memory
            return Prepared(config, split.header, taken)

        self._start(
            Serving(
                split.source,
                self._settings,
                self._around,
                preparing,
                memory=memory,
                on_over=self._ring_over,
            )
        )
        return True

    def _rejoin(self, model: str, group: Group, kind: Kind) -> bool:
        """Go on as the head of a group with what is loaded; False: nothing is, or other layers."""
        kept = self._kept.take(model, kind, self._free())
        if kept is None:
            return False
        serving, task = kept
        if not serving.join(place_in(group, self._around.bus.identity, self._nats)):
            return False
        _log.info("head.rejoins", model=model, group=group.id)
        self._servings[model], self._tasks[model] = serving, task
        self._around.on_change()
        return True

    def _drop_kept(self) -> None:
        """Let go of all that no group needs: the memory is wanted."""
        self.stages.drop_kept()
        self._kept.drop()

    def _whole(self, source: ModelSource, budget: MemoryBudget) -> Preparing:
        """How the engine of a whole model is made ready, its memory out of a budget."""
        return partial(
            prepare,
            source,
            self._settings,
            worker=self._around.bus.identity,
            budget=budget,
            stopping=self._around.stopping,
        )

    async def end(self, model: str, reason: str) -> None:
        """Give up a model whose group is at its end: its answers may go on elsewhere."""
        serving, task = self._servings.get(model), self._tasks.get(model)
        if serving is None or task is None:
            return
        if serving.leave(reason):
            self._set_aside(serving)
            return
        # Else it would have some seconds to hear of it, while it waits for a stage that is gone.
        serving.kill()
        task.cancel()
        await asyncio.wait({task})

    def start(self, model: str) -> bool:
        """Start a role; whether there is such a model, not started yet, and room for it."""
        source = self._roles.get(model)
        cost = next((known.memory for known in self.able if known.name == model), None)
        if source is None or cost is None or model in self._servings or cost > self._free():
            return False
        self._drop_kept()
        preparing = self._whole(source, MemoryBudget(cost, 1))
        self._start(Serving(source, self._settings, self._around, preparing, memory=cost))
        return True

    async def stop(self, model: str) -> None:
        """Take nothing new for a role, let what runs come to its end, and unload it."""
        serving = self._servings.get(model)
        if serving is None or self.is_pinned(model):
            return
        serving.drain()
        self._around.on_change()
        await serving.attempts.idle()
        task = self._tasks.get(model)
        if task is not None:
            task.cancel()
            await asyncio.wait({task})
        self._around.on_change()

    def _resting(self) -> set[str]:
        """Those that have failed a while ago."""
        now = time.monotonic()
        self._failed = {name: until for name, until in self._failed.items() if until > now}
        return set(self._failed)

    def _free(self) -> int:
        models = sum(state.memory for serving in self for state in serving.states()[:1])
        return self._memory - models - self.stages.memory

    def _on_stage(self) -> None:
        self._around.on_change()
        self._around.on_release()

    def _start(self, serving: Serving) -> None:
        self._servings[serving.name] = serving
        self._tasks[serving.name] = self._group.create_task(self._run(serving), name=serving.name)
        self._around.on_change()

    def _rest(self, serving: Serving) -> float:
        """Seconds for which a model that has failed is not tried again."""
        if serving.name not in self._split:
            return FAILED_SECONDS
        # A group that was there and is lost is formed anew at once.
        times = 0 if serving.was_ready else self._in_vain.get(serving.name, 0) + 1
        self._in_vain[serving.name] = times
        return min(MOST_REST_SECONDS, REST_SECONDS * 2.0 ** min(times - 1, 16)) if times else 0.0

    def _ring_over(self, serving: Serving, reason: str) -> None:
        """Its engine says so, of a group that may have been given up before."""
        if self._servings.get(serving.name) is serving:
            self._set_aside(serving)
            self._fail(serving, reason)

    def _set_aside(self, serving: Serving) -> None:
        """Keep the head of a group that is over for the next one."""
        name = serving.name
        del self._servings[name]
        self._kept.keep(serving, self._tasks.pop(name), self._heads[name])
        self._around.on_change()
        self._around.on_release()

    def _fail(self, serving: Serving, reason: str) -> None:
        if not self.is_pinned(serving.name):
            self._failed[serving.name] = time.monotonic() + self._rest(serving)
            self._failures[serving.name] = reason
        self._on_failed(serving.name, reason)

    async def _run(self, serving: Serving) -> None:
        name = serving.name
        try:
            await serving.run()
            if serving.failure and self._servings.get(name) is serving:
                self._fail(serving, serving.failure)
        finally:
            if not self.is_pinned(name):
                serving.attempts.abandon(
                    f"worker {self._around.bus.identity} does not serve it any more"
                )
                self._kept.forget(serving)
                if self._servings.get(name) is serving:
                    del self._servings[name], self._tasks[name]
                self._around.on_change()
