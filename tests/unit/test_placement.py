"""Placement by example: one rule a test, on a fleet that does what it is told."""

import random

import msgspec
import pytest

from shared.demand import Demand
from shared.placement import decide
from shared.replicas import (
    HEDGE,
    IDLE_AFTER,
    SETTLE,
    enough,
    spare,
)
from shared.snapshot import Holding, LeaseView, ModelSettings, Snapshot, WorkerView
from tests.unit.toy_fleet import ABLE, GIB, START, ToyFleet, fleet_of, shuffled


def test_of_twenty_standbys_exactly_one_promotes():
    fleet = fleet_of(20)
    fleet.ask("a")
    actions = fleet.step()
    assert [(action.kind, action.model, action.replica) for action in actions] == [
        ("promote", "a", 0)
    ]
    assert actions[0].reason == "1 waiting since 0.0 s"
    assert fleet.settle() < 7
    assert fleet.count("a") == 1


def test_a_burst_loads_one_however_many_wait():
    fleet = fleet_of(20, load=40)
    for _ in range(35):
        fleet.loads["a"] = 50
        fleet.step()
    assert fleet.count("a") == 1


def test_a_second_worker_tries_when_the_first_one_loads_for_long_and_no_third_does():
    fleet = fleet_of(20, load=500)
    fleet.ask("a")
    fleet.step()
    fleet.step(HEDGE - 2)
    assert fleet.step() == []
    (action,) = fleet.step()
    assert (action.kind, action.replica) == ("promote", 1)
    assert action.reason == "the only one has been loading for 60 s"
    for _ in range(300):
        assert fleet.step() == []
    fleet.settle()
    assert fleet.count("a") == 1


def test_three_wanted_of_twenty_are_three_workers():
    fleet = fleet_of(20)
    fleet.settings["a"] = ModelSettings("a", minimum=3)
    assert len(fleet.step()) == 3
    fleet.settle()
    assert fleet.count("a") == len(fleet.where("a")) == 3
    assert {key for key in fleet.leases if key[0] == "a"} == {("a", 0), ("a", 1), ("a", 2)}


@pytest.mark.parametrize("seed", range(100))
def test_with_views_of_half_the_fleet_one_gets_the_lease(seed: int):
    fleet = fleet_of(20)
    fleet.ask("a")
    rng = random.Random(seed)

    def half(name: str, whole: Snapshot) -> Snapshot:
        seen = tuple(w for w in whole.workers if w.name == name or rng.random() < 0.5)
        return msgspec.structs.replace(whole, workers=seen)

    fleet.step(view=half)
    assert fleet.count("a") == 1
    fleet.settle(view=half)
    assert fleet.count("a") == 1


def test_idle_goes_sixty_seconds_after_its_last_use():
    fleet = fleet_of(3)
    fleet.ask("a")
    fleet.settle()
    fleet.leave("a")
    left = fleet.now
    while fleet.count("a"):
        actions = fleet.step(0.5)
    assert fleet.now - left == pytest.approx(IDLE_AFTER + 0.5)
    assert actions[0].reason == "idle for 60 s"


def test_idle_stays_at_its_minimum():
    fleet = fleet_of(3)
    fleet.settings["a"] = ModelSettings("a", minimum=1)
    fleet.ask("a", load=12)
    fleet.settle()
    assert fleet.count("a") == 2
    fleet.leave("a")
    fleet.step(IDLE_AFTER)
    fleet.settle()
    assert fleet.count("a") == 1


def test_what_took_long_to_load_is_not_dropped_when_it_is_there():
    fleet = fleet_of(1, load=100)
    fleet.ask("a")
    fleet.step()
    fleet.leave("a")
    fleet.step(101)
    assert fleet.count("a", "ready") == 1
    assert fleet.step(IDLE_AFTER - 2) == []
    fleet.step(3)
    assert [action.kind for action in fleet.step()] == ["demote"]


def test_replicas_follow_load_up_and_down():
    fleet = fleet_of(20)
    fleet.ask("a", load=40)
    fleet.settle()
    assert fleet.count("a") == enough(40, 40, 8) == 6
    fleet.ask("a", load=3)
    fleet.settle()
    assert fleet.count("a") == spare(3, 3, 8) == 2


def test_replicas_grow_fourfold_at_most_and_wait_for_what_loads():
    fleet = fleet_of(20, load=5)
    fleet.ask("a", load=100)
    counts = []
    for _ in range(70):
        fleet.step()
        counts.append(fleet.count("a"))
    assert sorted(set(counts)) == [1, 4, 14]
    for before, after in ((1, 4), (4, 14)):
        lasted = counts.index(after) - counts.index(before)
        assert lasted >= 5 + SETTLE


def test_maximum_holds_and_minimum_goes_before_it():
    fleet = fleet_of(20)
    fleet.settings["a"] = ModelSettings("a", maximum=2)
    fleet.ask("a", load=100)
    fleet.settle()
    assert fleet.count("a") == 2
    fleet.settings["a"] = ModelSettings("a", maximum=2, minimum=3)
    fleet.settle()
    assert fleet.count("a") == 3


def test_several_models_share_a_worker_and_never_more_than_fit():
    fleet = fleet_of(1, memory=2 * GIB)
    for model in ("a", "b", "c"):
        fleet.ask(model)
    fleet.settle()
    assert sum(fleet.count(model) for model in ("a", "b", "c")) == 2
    assert fleet.used("w0") == 2 * GIB


def test_an_empty_worker_is_preferred_and_the_smallest_that_fits():
    fleet = ToyFleet()
    fleet.add("huge", 64 * GIB, ABLE)
    fleet.add("small", 2 * GIB, ABLE)
    fleet.ask("a")
    fleet.settle()
    assert fleet.where("a") == ["small"]
    fleet.ask("big")
    fleet.settle()
    assert fleet.where("big") == ["huge"]
    fleet.ask("b")
    fleet.settle()
    assert fleet.where("b") == ["small"]


def test_what_the_workers_operator_named_stays_and_counts():
    fleet = ToyFleet()
    fleet.add("mine", GIB, ABLE, "a")
    fleet.add("other", GIB, ABLE)
    fleet.ask("a")
    fleet.settle()
    assert fleet.where("a") == ["mine"]
    fleet.leave("a")
    fleet.ask("b")
    fleet.step(2 * IDLE_AFTER)
    fleet.settle()
    assert (fleet.where("a"), fleet.where("b")) == (["mine"], ["other"])
    assert [action.kind for _, action in fleet.done if action.model == "a"] == ["adopt"]


def test_a_worker_that_shuts_down_is_replaced_while_it_drains():
    fleet = fleet_of(2, drain=1000)
    fleet.ask("a")
    fleet.settle()
    (leaver,) = fleet.where("a")
    fleet.close(leaver)
    (action,) = fleet.step()
    assert (action.kind, action.worker != leaver, action.replica) == ("promote", True, 1)


def test_a_dead_worker_is_replaced_at_once_when_somebody_waits():
    fleet = fleet_of(2)
    fleet.ask("a")
    fleet.settle()
    (dead,) = fleet.where("a")
    fleet.remove(dead)
    (action,) = fleet.step()
    assert (action.kind, action.model, action.replica) == ("promote", "a", 0)


def test_when_all_leases_are_lost_holders_claim_them_anew():
    fleet = fleet_of(6)
    fleet.ask("a", load=30)
    fleet.ask("b")
    fleet.settle()
    holders = fleet.where("a")
    fleet.leases.clear()
    assert {action.kind for action in fleet.step()} == {"adopt"}
    fleet.settle()
    assert fleet.where("a") == holders
    assert {lease.worker for lease in fleet.leases.values() if lease.model == "a"} == {*holders}


def test_leases_of_workers_out_of_sight_count():
    able = {"a": GIB}
    snapshot = Snapshot(
        workers=(WorkerView("w1", GIB, able),),
        leases=(LeaseView("a", 0, "elsewhere"),),
        demand={"a": Demand(running=1, load=1, sustained=1, last_use=START)},
    )
    decision = decide(snapshot, START)
    assert (decision.wants["a"].present, decision.actions) == (1, ())


def test_a_lease_that_its_worker_does_not_tell_of_yet_reserves_its_memory():
    snapshot = Snapshot(
        workers=(WorkerView("w1", GIB, {"a": GIB, "b": GIB}),),
        leases=(LeaseView("a", 0, "w1"),),
        demand={"b": Demand(waiting=1, waiting_since=START, last_use=START)},
    )
    assert decide(snapshot, START).actions == ()


def test_a_ready_replica_does_not_go_before_the_one_that_stays_is_ready():
    holds = {"w1": "loading", "w2": "ready"}
    snapshot = Snapshot(
        workers=tuple(
            WorkerView(name, GIB, {"a": GIB}, (Holding("a", state, START - 50, memory=GIB),))
            for name, state in holds.items()
        ),
        leases=(LeaseView("a", 0, "w1"), LeaseView("a", 1, "w2")),
        settings={"a": ModelSettings("a", maximum=1)},
        demand={"a": Demand(running=1, last_use=START)},
    )
    assert decide(snapshot, START).actions == ()


def test_a_model_that_nobody_can_load_is_wanted_in_vain():
    fleet = fleet_of(3)
    fleet.ask("never/heard:of")
    assert fleet.step() == []
    assert decide(fleet.snapshot(), fleet.now).wants["never/heard:of"].replicas == 1


def test_order_of_input_is_irrelevant():
    fleet = fleet_of(12, memory=3 * GIB)
    for model, load in (("a", 30), ("b", 9), ("c", 0.1), ("big", 3)):
        fleet.ask(model, load)
    rng = random.Random(5)
    for _ in range(30):
        snapshot = fleet.snapshot()
        expected = decide(snapshot, fleet.now)
        mixed = decide(shuffled(snapshot, rng), fleet.now)
        assert (mixed.wants, mixed.actions) == (expected.wants, expected.actions)
        fleet.step(5)
