"""The parts that this worker carries of models whose head is another's.

What leases say is what is done: a part is loaded when a live lease gives it to this worker, and let
go of when that lease is gone or names another group. A part that cannot be had, or whose engine
ends, is told as failed; then the head gives the lease back. The part of a group that is over stays
loaded for a while, or goes on loading: it is part of the next group at once, if that has the same
cuts.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import NamedTuple

import structlog

from shared.groups import Group, Part, StageState
from worker.engine_process import EngineGaveUp, EngineProcess
from worker.gguf_header import GgufError
from worker.link import Ready, RingPlace, Step
from worker.model_bytes import SourceError
from worker.part import PartRefused, PartStopped, place_in, prepare_part
from worker.preparing import ServingSettings
from worker.split_source import SplitSource

__all__ = ("KEEP_SECONDS", "Kind", "Stages", "kind_of")

ROOM_SECONDS = 8.0
"""How long a part waits for the memory of one that is being let go of."""

KEEP_SECONDS = 30.0
"""How long a part without a group stays loaded."""

LOOK_EVERY = 1.0
"""Seconds after which leases are looked at anew: one that runs out tells of nothing."""

_log = structlog.get_logger()


class Kind(NamedTuple):
    """What a loaded part is; the same for any group."""

    model: str
    digest: str
    start: int
    stop: int
    slots: int
    context: int
    step: int


class _Carried:
    """One part; hears its engine."""

    def __init__(self, model: str, group: Group, part: Part, on_change: Callable[[], None]) -> None:
        self.group: Group | None = group
        self.part = part
        self.kind = kind_of(model, group, part)
        self.state = "loading"
        self.detail = ""
        self.process: EngineProcess | None = None
        self.loaded = False
        self.kept_since = 0.0
        self._next: RingPlace | None = None
        """Where it goes when it has loaded, for a group that is over."""
        self.task: asyncio.Task[None] | None = None
        self._on_change = on_change

    @property
    def told(self) -> StageState:
        """As a beat tells of it."""
        return StageState(
            group="" if self.group is None else self.group.id,
            model=self.kind.model,
            start=self.part.start,
            stop=self.part.stop,
            memory=self.part.memory,
            state=self.state,
            detail=self.detail,
        )

    def become(self, state: str, detail: str = "") -> None:
        """Note how far it is, for others to hear."""
        self.state, self.detail = state, detail
        self._on_change()

    def keep(self) -> None:
        """Its group is over."""
        self.group, self.kept_since, self._next = None, time.monotonic(), None
        self.become("kept")

    def join(self, group: Group, part: Part, worker: str, nats: str) -> bool:
        """Take part in another group; False: what was loaded is not there any more."""
        place = place_in(group, worker, nats)
        if not self.loaded:
            self._next = place
        elif self.process is None or not self.process.join(place):
            return False
        self.group, self.part = group, part
        self.become("loading")
        return True

    def note(self, detail: str) -> None:
        """A later beat tells it; maybe from another thread."""
        self.detail = detail

    def on_loading(self, progress: float) -> None:
        """See EngineEvents."""
        self.detail = f"loading {progress:.0%}"

    def on_ready(self, ready: Ready) -> None:
        """See EngineEvents."""
        self.loaded = True
        place, self._next = self._next, None
        if place is not None and self.process is not None and self.process.join(place):
            return  # it is ready once more when it is there
        if self.group is not None:
            _log.info("stage.ready", model=self.kind.model, group=self.group.id)
            if ready.advice:
                _log.warning("model.advice", model=self.kind.model, advice=ready.advice)
            self.become("ready", ready.advice)

    def on_step(self, step: Step) -> None:
        """See EngineEvents; a stage without the head answers nobody."""

    def on_lost(self, reason: str) -> None:
        """See EngineEvents."""
        if self.group is not None:
            _log.warning("stage.failed", model=self.kind.model, reason=reason)
            self.become("failed", reason)


class Stages:
    """All of them; `run` does what leases say until it is cancelled."""

    def __init__(
        self,
        worker: str,
        nats: str,
        settings: ServingSettings,
        *,
        groups: Callable[[], Mapping[str, Group]],
        source: Callable[[str], SplitSource | None],
        free: Callable[[], int],
        make_room: Callable[[], None],
        stopping: threading.Event,
        on_change: Callable[[], None],
    ) -> None:
        """Make them.

        Args:
            worker: who this is.
            nats: its URL of the server.
            settings: for all models.
            groups: those of live leases, by their models.
            source: a model that this worker could carry a part of.
            free: bytes that are left.
            make_room: lets go of what is kept, `drop_kept` among it.
            stopping: set when the worker ends.
            on_change: told when there is news for a beat.
        """
        self._worker = worker
        self._nats = nats
        self._settings = settings
        self._groups = groups
        self._source = source
        self._free = free
        self._make_room = make_room
        self._stopping = stopping
        self._on_change = on_change
        self._carried: list[_Carried] = []
        self._news = asyncio.Event()
        self._freed = asyncio.Event()

    @property
    def needed(self) -> bool:
        """Whether some group that lives has a part here."""
        return any(carried.group is not None for carried in self._carried)

    def poke(self) -> None:
        """Leases have changed: look."""
        self._news.set()

    def states(self) -> tuple[StageState, ...]:
        """All parts as beats tell of them."""
        return tuple(carried.told for carried in self._carried)

    @property
    def memory(self) -> int:
        """Bytes that nobody else here can have."""
        return sum(state.taken for state in self.states())

    def drop_kept(self) -> None:
        """Let go of all that no group needs: the memory is wanted."""
        for carried in self._carried:
            if carried.group is None and carried.task is not None:
                carried.task.cancel()

    async def run(self) -> None:
        """Carry what leases give to this worker."""
        async with asyncio.TaskGroup() as group:
            while True:
                self._news.clear()
                self._follow(group)
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_EVERY):
                        await self._news.wait()

    def _follow(self, tasks: asyncio.TaskGroup) -> None:
        wanted = {
            group.id: (model, group, group.parts[index])
            for model, group in self._groups().items()
            if (index := group.index(self._worker)) is not None
            and group.head.worker != self._worker
        }
        for carried in self._carried:
            self._look_after(carried, wanted.keys())
        here = {carried.group.id for carried in self._carried if carried.group is not None}
        for identity, (model, group, part) in wanted.items():
            if identity not in here:
                self._begin(model, group, part, tasks)

    def _look_after(self, carried: _Carried, wanted: Collection[str]) -> None:
        """Keep a part whose group is over, if it can be, but not for ever."""
        if carried.group is not None and carried.group.id in wanted:
            return
        if carried.group is not None and carried.state in ("loading", "ready"):
            carried.keep()
        elif (
            carried.group is not None or time.monotonic() - carried.kept_since > KEEP_SECONDS
        ) and carried.task is not None:
            carried.task.cancel()

    def _begin(self, model: str, group: Group, part: Part, tasks: asyncio.TaskGroup) -> None:
        kind = kind_of(model, group, part)
        for carried in self._carried:
            fits = carried.group is None and carried.kind == kind
            if fits and carried.join(group, part, self._worker, self._nats):
                _log.info("stage.rejoins", model=model, group=group.id)
                return
        self._make_room()
        carried = _Carried(model, group, part, self._on_change)
        self._carried.append(carried)
        carried.task = tasks.create_task(self._carry(carried), name=f"stage {model}")

    async def _carry(self, carried: _Carried) -> None:
        """Carry one part until it is not needed any more: this task is cancelled then."""
        _log.info("stage.begins", model=carried.kind.model)
        carried.become("loading")
        try:
            reason = await self._life(carried)
            if carried.group is None:
                return
            _log.warning("stage.failed", model=carried.kind.model, reason=reason)
            carried.become("failed", reason)
            await asyncio.Event().wait()
        finally:
            self._carried.remove(carried)
            self._freed.set()
            _log.info("stage.over", model=carried.kind.model)
            self._on_change()

    async def _life(self, carried: _Carried) -> str:
        """Load and serve; returns why that came to its end."""
        group, split = carried.group, self._source(carried.kind.model)
        if split is None or group is None:
            return f"there is no model {carried.kind.model!r} here to take a part of"
        try:
            async with asyncio.timeout(ROOM_SECONDS):
                await self._room(carried)
        except TimeoutError:
            return "there is no memory left for it"
        try:
            config = await prepare_part(
                split,
                self._settings,
                group,
                worker=self._worker,
                nats=self._nats,
                stopping=self._stopping,
                tell=carried.note,
            )
            carried.process = EngineProcess(config, carried, command=self._settings.command)
            await carried.process.run()
        except (PartRefused, GgufError, SourceError, EngineGaveUp) as error:
            return " ".join(str(error).split())
        except PartStopped:
            return "the worker ends"
        finally:
            carried.process = None
        return "its engine has ended"

    async def _room(self, carried: _Carried) -> None:
        """Return once there is room for it and for all that came before it.

        Two groups may have been formed at once, of heads that did not know of each other: then the
        first one has the memory.
        """
        while self._free() + self._after(carried) < 0:
            self._freed.clear()
            await self._freed.wait()

    def _after(self, carried: _Carried) -> int:
        """Bytes of those that have come after it."""
        later = self._carried[self._carried.index(carried) + 1 :]
        return sum(one.told.taken for one in later)


def kind_of(model: str, group: Group, part: Part) -> Kind:
    """What a part of a group is, once it is loaded."""
    return Kind(model, group.digest, part.start, part.stop, group.slots, group.context, group.step)
