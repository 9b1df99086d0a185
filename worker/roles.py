"""Which models this worker takes up and lets go: what the placement function says of it, done.

Every worker asks `shared.placement.decide` about the same fleet and acts on what is said of itself.
What it takes up it claims first (`shared.leases`), so that of two workers that see different things
one gets it. Nothing is decided before the worker has heard enough to decide on, and nothing here
can fail a request: when NATS or JetStream is away, all goes on as it is.
"""

import asyncio
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Literal, NamedTuple, Protocol

import structlog

from shared import grouping
from shared.bus import BusUnavailable
from shared.groups import Group
from shared.leases import RENEW_SECONDS, LeaseKey, Leases
from shared.model_shape import ModelShape
from shared.placement import Action, Decision, decide
from shared.presence import Beat, RoleChange
from shared.replicas import DEFAULT_TIMING, Timing, Want
from shared.snapshot import Snapshot
from worker.outlook import Outlook
from worker.stages import KEEP_SECONDS

__all__ = ("Host", "Roles")

TICK = 1.0
"""Seconds between two decisions where nothing has happened: times pass by themselves."""

SHARE = 0.05
"""Share of its time that a worker decides at most; in a very large fleet it decides less often."""

GATHER = 0.05
"""Seconds between two decisions at least, however much happens."""

_log = structlog.get_logger()


class Host(Protocol):
    """What serves the models."""

    def start(self, model: str) -> bool:
        """Start a role; False if it cannot be."""

    async def stop(self, model: str) -> None:
        """Drain a role and return when it is gone."""

    def is_pinned(self, model: str) -> bool:
        """Whether it is served whatever is decided."""

    @property
    def shapes(self) -> Mapping[str, ModelShape]:
        """Of the models that are too large for it alone."""

    def start_group(self, model: str, group: Group) -> bool:
        """Start a role as the head of a group; False if it cannot be."""

    async def end(self, model: str, reason: str) -> None:
        """End a role at once, with what runs."""

    def note_missing(self, model: str, why: str) -> None:
        """Tell why a model cannot be carried by those in sight; empty: it can."""


class _Led(NamedTuple):
    """A group whose head this worker is."""

    key: LeaseKey
    group: Group
    since: float
    """By a monotonic clock."""
    known: Mapping[str, float]
    """Who has told of a part, and when its process began."""


class _View(NamedTuple):
    """What is known, and what is to be done about it."""

    snapshot: Snapshot
    decision: Decision
    proposal: grouping.Proposal | None


class Roles:
    """One worker's roles; `run` decides and acts until it is cancelled."""

    def __init__(
        self,
        worker: str,
        host: Host,
        outlook: Outlook,
        leases: Leases,
        *,
        presence: Callable[[], Beat],
        changes: deque[RoleChange],
        timing: Timing = DEFAULT_TIMING,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Make them.

        Args:
            worker: who we are.
            host: starts and stops models.
            outlook: what is known of others.
            leases: ours.
            presence: what the worker would tell of itself now.
            changes: where role changes are noted for others to read.
            timing: the times of the rules.
            wall: unix time.
        """
        self._worker = worker
        self._host = host
        self._presence = presence
        self._changes = changes
        self._outlook = outlook
        self._leases = leases
        self._timing = timing
        self._wall = wall
        self._news = asyncio.Event()
        self._renew = asyncio.Event()
        self._leaving: set[str] = set()
        self._led: dict[str, _Led] = {}
        self._last: dict[str, tuple[Group, float]] = {}
        self._lost: list[tuple[LeaseKey, str]] = []

    def poke(self) -> None:
        """Something has happened: decide soon."""
        self._news.set()

    def lost(self, key: LeaseKey, holder: str) -> None:
        """A lease of ours is another worker's."""
        self._lost.append((key, holder))
        self.poke()

    def failed(self, model: str, reason: str) -> None:
        """A role could not be served, and is gone."""
        self._note(model, "fail", reason)
        self.poke()

    def reconnected(self) -> None:
        """NATS is back."""
        self._leases.reconnected()
        self._outlook.reconnected()
        self._renew.set()

    async def run(self) -> None:
        """Decide and act until cancelled; what is draining then is left to whoever cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep(), name="leases")
            while True:
                self._let_lost_go(group)
                started = time.monotonic()
                view = self._decide()
                # Not what follows: a claim that is not answered waits, and decides nothing.
                took = time.monotonic() - started
                for action in view.decision.of(self._worker) if view else ():
                    await self._act(action, group)
                if view:
                    await self._watch_groups(view.snapshot, group)
                await self._give_back()
                if view:
                    await self._form(view.proposal)
                await self._pause(max(GATHER, took / SHARE))

    async def release_all(self) -> None:
        """Give all leases back: the worker ends."""
        for key in self._leases.held:
            await self._leases.release(key)

    def _decide(self) -> _View | None:
        if not self._outlook.complete:
            return None
        own = self._presence()
        for model in own.models:
            ready = model.state == "ready"
            if self._leases.mark(model.name, "ready" if ready else "loading"):
                self._renew.set()
        try:
            snapshot = self._outlook.snapshot(own)
            decision = decide(snapshot, self._wall(), self._timing)
            return _View(snapshot, decision, self._propose(snapshot, decision.wants))
        except Exception:
            # What others have told must not end a worker that serves.
            _log.exception("roles.undecided")
            return None

    def _propose(self, snapshot: Snapshot, wants: Mapping[str, Want]) -> grouping.Proposal | None:
        """The group that this worker is to claim now; tells which models nobody can carry."""
        shapes = self._host.shapes
        if not shapes:
            return None
        for part in self._presence().parts:
            why = grouping.missing(snapshot, part, shapes[part.name])
            self._host.note_missing(part.name, why)
        return grouping.propose(
            snapshot,
            wants,
            shapes,
            worker=self._worker,
            identity=secrets.token_hex(8),
            last=self._groups_of_late(),
        )

    async def _form(self, proposal: grouping.Proposal | None) -> None:
        """Claim a group for a model that nobody holds alone, if this worker is to be its head."""
        if proposal is None or proposal.model in self._led:
            return
        key = LeaseKey(proposal.model, proposal.replica)
        try:
            if not await self._leases.claim(key, group=proposal.group):
                return
        except BusUnavailable as error:
            _log.debug("role.unclaimed", model=proposal.model, reason=str(error))
            return
        if self._host.start_group(proposal.model, proposal.group):
            self._led[proposal.model] = _Led(key, proposal.group, time.monotonic(), {})
            others = ", ".join(proposal.group.workers[:-1])
            reason = f"{proposal.reason}; with {others}" if others else proposal.reason
            self._note(proposal.model, "promote", reason)
        else:
            await self._leases.release(key)

    def _groups_of_late(self) -> Mapping[str, Group]:
        """By model, those that live, and those that did a moment ago."""
        now = time.monotonic()
        self._last |= {model: (group, now) for model, group in self._leases.groups().items()}
        self._last = {
            model: (group, seen)
            for model, (group, seen) in self._last.items()
            if now - seen < KEEP_SECONDS
        }
        return {model: group for model, (group, _) in self._last.items()}

    async def _watch_groups(self, snapshot: Snapshot, group: asyncio.TaskGroup) -> None:
        """End the groups that have lost a part, and let go of those of which one is leaving."""
        here = {model.name for model in self._presence().models}
        for model, led in list(self._led.items()):
            if led.key not in self._leases.held or model not in here:
                del self._led[model]
                continue
            age = time.monotonic() - led.since
            why, whole = grouping.ending(led.group, snapshot, age, led.known)
            known = {**grouping.joined(led.group, snapshot), **led.known}
            self._led[model] = led._replace(known=known)
            if why and whole:
                self._begin_leaving(model, "demote", why, group)
            elif why:
                self._note(model, "fail", why)
                await self._host.end(model, why)

    async def _act(self, action: Action, group: asyncio.TaskGroup) -> None:
        if action.kind == "demote":
            self._begin_leaving(action.model, "demote", action.reason, group)
            return
        key = LeaseKey(action.model, action.replica)
        try:
            if not await self._leases.claim(key):
                return
        except BusUnavailable as error:
            _log.debug("role.unclaimed", model=action.model, reason=str(error))
            return
        if action.kind == "promote":
            if self._host.start(action.model):
                self._note(action.model, "promote", action.reason)
            else:
                # Something else has taken the room since; another worker may have it.
                await self._leases.release(key)

    def _begin_leaving(
        self,
        model: str,
        action: Literal["demote", "lost"],
        reason: str,
        group: asyncio.TaskGroup,
    ) -> None:
        if model in self._leaving or self._host.is_pinned(model):
            return
        self._leaving.add(model)
        self._note(model, action, reason)
        group.create_task(self._leave(model), name=f"leave {model}")

    async def _leave(self, model: str) -> None:
        await self._host.stop(model)
        self._leaving.discard(model)
        self.poke()

    def _let_lost_go(self, group: asyncio.TaskGroup) -> None:
        lost, self._lost = self._lost, []
        for key, holder in lost:
            if not any(held.model == key.model for held in self._leases.held):
                self._begin_leaving(key.model, "lost", f"{holder} holds it", group)

    async def _give_back(self) -> None:
        """Release the leases of what is not served here, or not any more."""
        here = {model.name for model in self._presence().models if model.state != "failed"}
        for key in self._leases.held:
            if key.model not in here:
                await self._leases.release(key)

    def _note(
        self, model: str, action: Literal["promote", "demote", "lost", "fail"], reason: str
    ) -> None:
        self._changes.append(RoleChange(self._wall(), model, action, reason))
        _log.info(f"role.{action}", model=model, reason=reason)

    async def _pause(self, least: float) -> None:
        await asyncio.sleep(least)
        with suppress(TimeoutError):
            async with asyncio.timeout(TICK):
                await self._news.wait()
        self._news.clear()

    async def _keep(self) -> None:
        """Renew the leases in time, at once when something about them has changed."""
        while True:
            self._renew.clear()
            with suppress(BusUnavailable):  # the bus says so itself, once an outage
                await self._leases.renew()
            with suppress(TimeoutError):
                async with asyncio.timeout(RENEW_SECONDS):
                    await self._renew.wait()
