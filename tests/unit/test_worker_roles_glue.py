"""From decisions to deeds: what a worker does about what is said of it, with all else played."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from structlog.testing import capture_logs

import worker.roles
from shared import grouping
from shared.bus import BusUnavailable
from shared.grouping import Proposal
from shared.groups import Group, Part
from shared.leases import LeaseKey
from shared.model_shape import ModelShape
from shared.placement import Action, Decision
from shared.presence import Beat, ModelState, RoleChange
from worker.roles import Roles


class PlayedLeases:
    def __init__(self) -> None:
        self.mine: set[LeaseKey] = set()
        self.claimed: list[LeaseKey] = []
        self.released: list[LeaseKey] = []
        self.verdict: Callable[[], bool] = lambda: True
        self.states: dict[str, str] = {}
        self.renewals = 0
        self.answer_after = 0.0
        self.grouped: dict[LeaseKey, Group] = {}

    @property
    def held(self) -> frozenset[LeaseKey]:
        return frozenset(self.mine)

    def groups(self) -> dict[str, Group]:
        return {key.model: group for key, group in self.grouped.items() if key in self.mine}

    async def claim(
        self, key: LeaseKey, *, state: str = "loading", group: Group | None = None
    ) -> bool:
        if group is not None:
            self.grouped[key] = group
        self.claimed.append(key)
        await asyncio.sleep(self.answer_after)
        if self.verdict():
            self.mine.add(key)
            return True
        return False

    async def release(self, key: LeaseKey) -> None:
        self.mine.discard(key)
        self.released.append(key)

    async def renew(self) -> None:
        self.renewals += 1

    def mark(self, model: str, state: str) -> bool:
        return self.states.setdefault(model, state) != state


class PlayedFleet:
    """Host and outlook at once, and the decisions."""

    def __init__(self) -> None:
        self.complete = True
        self.models: dict[str, str] = {}
        self.pinned: set[str] = set()
        self.startable = True
        self.started: list[str] = []
        self.stopped: list[str] = []
        self.drained = asyncio.Event()
        self.actions: list[Action] = []
        self.decisions = 0
        self.broken = False
        self.leases = PlayedLeases()
        self.changes: deque[RoleChange] = deque(maxlen=8)
        self.shapes: dict[str, ModelShape] = {}
        self.led: list[Group] = []
        self.ended: list[tuple[str, str]] = []
        self.missing: dict[str, str] = {}
        self.proposal: Proposal | None = None
        self.ending = ("", False)
        self.roles = Roles(
            "me",
            self,
            self,  # type: ignore[arg-type]
            self.leases,  # type: ignore[arg-type]
            presence=self.presence,
            changes=self.changes,
            wall=lambda: 77.0,
        )

    def presence(self) -> Beat:
        states: Any = tuple(ModelState(name, state) for name, state in self.models.items())  # type: ignore[arg-type]
        return Beat("me", "ready", 1, states)

    def snapshot(self, own: Beat) -> Any:
        return own

    def decide(self, *_: Any) -> Decision:
        self.decisions += 1
        if self.broken:
            raise KeyError("what nobody foresaw")
        return Decision({}, tuple(self.actions))

    def start(self, model: str) -> bool:
        self.started.append(model)
        if self.startable:
            self.models[model] = "loading"
        return self.startable

    async def stop(self, model: str) -> None:
        self.stopped.append(model)
        self.models[model] = "draining"
        await self.drained.wait()
        del self.models[model]

    def start_group(self, model: str, group: Group) -> bool:
        self.led.append(group)
        if self.startable:
            self.models[model] = "loading"
        return self.startable

    async def end(self, model: str, reason: str) -> None:
        self.ended.append((model, reason))
        del self.models[model]

    def note_missing(self, model: str, why: str) -> None:
        self.missing[model] = why

    def is_pinned(self, model: str) -> bool:
        return model in self.pinned

    async def rounds(self, count: int = 2) -> None:
        """Until it has decided so many times more."""
        wanted = self.decisions + count
        async with asyncio.timeout(20):
            while self.decisions < wanted:
                self.roles.poke()
                await asyncio.sleep(0.005)

    def say(self, kind: Any, model: str = "m", replica: int = 0, worker: str = "me") -> None:
        self.actions.append(Action(kind, worker, model, replica, f"{kind} it"))

    @property
    def told(self) -> list[tuple[str, str, str]]:
        return [(change.action, change.model, change.reason) for change in self.changes]


@pytest.fixture
async def fleet(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[PlayedFleet]:
    fleet = PlayedFleet()
    monkeypatch.setattr(worker.roles, "decide", fleet.decide)
    monkeypatch.setattr(worker.roles, "GATHER", 0.0)
    monkeypatch.setattr(grouping, "propose", lambda *_, **__: fleet.proposal)
    monkeypatch.setattr(grouping, "ending", lambda *_: fleet.ending)
    monkeypatch.setattr(grouping, "joined", lambda *_: {})
    task = asyncio.create_task(fleet.roles.run())
    yield fleet
    task.cancel()
    (result,) = await asyncio.gather(task, return_exceptions=True)
    assert isinstance(result, asyncio.CancelledError), result


async def test_what_is_claimed_is_started_and_told(fleet: PlayedFleet) -> None:
    fleet.say("promote", "m", 2)
    fleet.say("promote", "other's", 0, worker="another")
    await fleet.rounds(1)
    fleet.actions.clear()
    await fleet.rounds()
    assert fleet.leases.claimed == [LeaseKey("m", 2)]
    assert fleet.started == ["m"]
    assert fleet.told == [("promote", "m", "promote it")]
    assert fleet.changes[0].at == 77.0
    assert fleet.leases.released == []


async def test_what_another_has_claimed_is_not_started(fleet: PlayedFleet) -> None:
    fleet.leases.verdict = lambda: False
    fleet.say("promote")
    await fleet.rounds()
    assert fleet.leases.claimed
    assert (fleet.started, fleet.told) == ([], [])


async def test_a_claim_that_waits_for_its_answer_delays_no_decision(
    fleet: PlayedFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Waiting is not deciding: of such a share of its time it would now be silent for minutes.
    monkeypatch.setattr(worker.roles, "SHARE", 0.001)
    fleet.leases.answer_after = 0.3
    fleet.leases.verdict = lambda: False
    fleet.say("promote")
    await fleet.rounds()
    fleet.leases.verdict = lambda: True
    await fleet.rounds()
    assert fleet.started


async def test_what_cannot_be_started_is_given_back(fleet: PlayedFleet) -> None:
    fleet.startable = False
    fleet.say("promote")
    await fleet.rounds()
    assert LeaseKey("m", 0) in fleet.leases.released
    assert fleet.leases.held == set()
    assert fleet.told == []


async def test_nats_away_costs_nothing_but_the_claim(fleet: PlayedFleet) -> None:
    def away() -> bool:
        raise BusUnavailable("NATS is away")

    fleet.leases.verdict = away
    fleet.say("promote")
    await fleet.rounds()
    fleet.leases.verdict = lambda: True
    await fleet.rounds(1)
    assert fleet.started[:1] == ["m"]


async def test_what_is_adopted_is_not_started_again(fleet: PlayedFleet) -> None:
    fleet.models["m"] = "ready"
    fleet.say("adopt")
    await fleet.rounds()
    assert fleet.leases.held == {LeaseKey("m", 0)}
    assert (fleet.started, fleet.told) == ([], [])


async def test_what_is_let_go_is_drained_once_and_its_lease_released_at_the_end(
    fleet: PlayedFleet,
) -> None:
    fleet.models["m"] = "ready"
    fleet.leases.mine.add(LeaseKey("m", 0))
    fleet.say("demote")
    await fleet.rounds(3)
    assert fleet.stopped == ["m"]
    assert fleet.told == [("demote", "m", "demote it")]
    assert fleet.leases.held == {LeaseKey("m", 0)}
    fleet.actions.clear()
    fleet.drained.set()
    await fleet.rounds()
    assert fleet.leases.released == [LeaseKey("m", 0)]


async def test_a_lost_lease_ends_the_role(fleet: PlayedFleet) -> None:
    fleet.models["m"] = "ready"
    fleet.roles.lost(LeaseKey("m", 1), "another")
    await fleet.rounds()
    assert fleet.stopped == ["m"]
    assert fleet.told == [("lost", "m", "another holds it")]


async def test_a_lost_lease_beside_another_of_the_same_model_ends_nothing(
    fleet: PlayedFleet,
) -> None:
    fleet.models["m"] = "ready"
    fleet.leases.mine.add(LeaseKey("m", 0))
    fleet.roles.lost(LeaseKey("m", 1), "another")
    await fleet.rounds()
    assert (fleet.stopped, fleet.told) == ([], [])


async def test_a_pinned_model_is_never_let_go(fleet: PlayedFleet) -> None:
    fleet.models["m"] = "ready"
    fleet.pinned.add("m")
    fleet.say("demote")
    fleet.roles.lost(LeaseKey("m", 0), "another")
    await fleet.rounds()
    assert (fleet.stopped, fleet.told) == ([], [])


async def test_the_lease_of_what_failed_is_given_back(fleet: PlayedFleet) -> None:
    fleet.models["m"] = "failed"
    fleet.leases.mine |= {LeaseKey("m", 0), LeaseKey("gone", 3)}
    fleet.roles.failed("m", "it is no model")
    await fleet.rounds()
    assert set(fleet.leases.released) == {LeaseKey("m", 0), LeaseKey("gone", 3)}
    assert fleet.told == [("fail", "m", "it is no model")]


async def test_nothing_is_done_before_enough_has_been_heard(fleet: PlayedFleet) -> None:
    await fleet.rounds(1)
    fleet.complete = False
    fleet.say("promote")
    fleet.leases.claimed.clear()
    for _ in range(20):
        fleet.roles.poke()
        await asyncio.sleep(0.005)
    before = fleet.decisions
    await asyncio.sleep(0.05)
    assert fleet.decisions == before
    fleet.complete = True
    await fleet.rounds(1)
    assert fleet.started == ["m"]


async def test_a_decision_that_cannot_be_made_ends_nothing(fleet: PlayedFleet) -> None:
    fleet.broken = True
    with capture_logs() as logs:
        await fleet.rounds()
    assert {line["event"] for line in logs} == {"roles.undecided"}
    fleet.broken = False
    fleet.say("promote")
    await fleet.rounds(1)
    assert fleet.started == ["m"]


async def test_a_model_that_has_become_ready_is_told_at_once(fleet: PlayedFleet) -> None:
    fleet.models["m"] = "loading"
    await fleet.rounds(1)
    renewed = fleet.leases.renewals
    fleet.models["m"] = "ready"
    await fleet.rounds()
    assert fleet.leases.renewals > renewed


GROUP = Group("g", "d", (Part("other", 0, 5, 1), Part("me", 5, 9, 1)), 1, 512, 32)
SHAPE = ModelShape("m", "llama", (), 0, 0, 0, 0, 0, 0, 0)


async def test_who_is_to_be_the_head_claims_for_the_whole_group(fleet: PlayedFleet) -> None:
    fleet.shapes = {"m": SHAPE}
    fleet.proposal = Proposal("m", 0, GROUP, "1 waiting")
    await fleet.rounds(3)
    key = LeaseKey("m", 0)
    assert fleet.leases.claimed == [key]
    assert fleet.leases.grouped == {key: GROUP}
    assert fleet.led == [GROUP]
    assert fleet.told == [("promote", "m", "1 waiting; with other")]


async def test_a_group_that_cannot_be_started_is_given_back(fleet: PlayedFleet) -> None:
    fleet.shapes = {"m": SHAPE}
    fleet.startable = False
    fleet.proposal = Proposal("m", 0, GROUP, "1 waiting")
    await fleet.rounds(1)
    fleet.proposal = None
    await fleet.rounds()
    assert fleet.leases.released == fleet.leases.claimed
    assert fleet.leases.held == frozenset()


async def test_a_group_that_has_lost_a_part_ends_and_its_lease_is_given_back(
    fleet: PlayedFleet,
) -> None:
    fleet.shapes = {"m": SHAPE}
    fleet.proposal = Proposal("m", 0, GROUP, "1 waiting")
    await fleet.rounds(1)
    fleet.proposal = None
    fleet.ending = ("other is gone", False)
    await fleet.rounds(3)
    assert fleet.ended == [("m", "other is gone")]
    assert fleet.leases.released == [LeaseKey("m", 0)]
    assert fleet.told[1:] == [("fail", "m", "other is gone")]


async def test_a_group_of_which_one_leaves_is_drained(fleet: PlayedFleet) -> None:
    fleet.shapes = {"m": SHAPE}
    fleet.proposal = Proposal("m", 0, GROUP, "1 waiting")
    await fleet.rounds(1)
    fleet.proposal = None
    fleet.ending = ("other leaves", True)
    await fleet.rounds(3)
    assert fleet.stopped == ["m"]
    assert fleet.leases.held == {LeaseKey("m", 0)}
    fleet.drained.set()
    await fleet.rounds(3)
    assert fleet.leases.held == frozenset()
    assert fleet.told[1:] == [("demote", "m", "other leaves")]
