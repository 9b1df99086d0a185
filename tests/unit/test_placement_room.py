"""Who makes room for whom: idle models, priorities, pins, and replicas too many."""

import msgspec
import pytest

from shared.demand import Demand
from shared.placement import decide
from shared.replicas import EVICT_AFTER, IDLE_AFTER, LEAST_STAY
from shared.snapshot import Holding, LeaseView, ModelSettings, Snapshot, WorkerView
from tests.unit.toy_fleet import ABLE, GIB, START, ToyFleet, fleet_of


def full_of_a_and_b() -> ToyFleet:
    """Two workers with room for one model each; `a` and `b` are in use."""
    fleet = fleet_of(2, memory=GIB)
    fleet.ask("a")
    fleet.ask("b")
    fleet.settle()
    fleet.step(LEAST_STAY)
    return fleet


def test_an_idle_model_makes_room_for_one_in_demand():
    fleet = full_of_a_and_b()
    fleet.leave("b")
    fleet.step(EVICT_AFTER - 1)
    fleet.ask("c")
    assert fleet.step(1) == []
    (action,) = fleet.step(1)
    assert (action.kind, action.model, action.reason) == ("demote", "b", "makes room for c")
    fleet.step(1)
    fleet.step(1)
    assert (fleet.count("a"), fleet.count("b"), fleet.count("c")) == (1, 0, 1)


def test_nothing_in_use_makes_room_whatever_the_priority():
    fleet = full_of_a_and_b()
    fleet.settings["c"] = ModelSettings("c", priority=9, minimum=1)
    fleet.ask("c")
    for _ in range(100):
        assert fleet.step() == []


def test_an_idle_model_of_higher_priority_stays_its_time():
    fleet = full_of_a_and_b()
    fleet.settings["b"] = ModelSettings("b", priority=1)
    fleet.leave("b")
    fleet.ask("c")
    fleet.step(IDLE_AFTER - 1)
    assert fleet.step(1) == []
    assert [action.reason for action in fleet.step(1)] == ["idle for 60 s"]


def test_the_lower_priority_goes_first_then_the_longest_unused():
    fleet = fleet_of(1, memory=3 * GIB)
    for model in ("a", "b", "c"):
        fleet.ask(model)
    fleet.settle()
    fleet.settings["a"] = ModelSettings("a", priority=1)
    fleet.settings["x"] = ModelSettings("x", priority=1)
    fleet.workers["w0"] = msgspec.structs.replace(fleet.workers["w0"], able={**ABLE, "x": GIB})
    for model in ("a", "b", "c"):
        fleet.leave(model)
        fleet.pass_time(1)
    fleet.pass_time(EVICT_AFTER)
    fleet.ask("x")
    assert [(action.kind, action.model) for action in fleet.step()] == [("demote", "b")]


def test_two_models_that_take_turns_are_not_loaded_for_every_request():
    fleet = fleet_of(1, memory=GIB)
    for turn in range(60):
        fleet.leave("b" if turn % 2 else "a")
        fleet.ask("a" if turn % 2 else "b")
        for _ in range(12):
            fleet.step()
    loads = sum(action.kind == "promote" for _, action in fleet.done)
    assert loads <= 60 * 12 / LEAST_STAY + 1


def test_a_first_replica_goes_before_anothers_second():
    fleet = fleet_of(4, memory=GIB)
    fleet.ask("a", load=30)
    fleet.settle()
    assert fleet.count("a") == 4
    fleet.ask("b")
    fleet.settle()
    assert (fleet.count("a"), fleet.count("b")) == (3, 1)
    fleet.leave("b")
    fleet.step(IDLE_AFTER)
    fleet.settle()
    assert (fleet.count("a"), fleet.count("b")) == (4, 0)


def test_a_higher_priority_takes_second_replicas_and_no_more():
    fleet = fleet_of(4, memory=GIB)
    fleet.ask("a", load=30)
    fleet.settle()
    fleet.settings["b"] = ModelSettings("b", priority=5)
    fleet.ask("b", load=30)
    fleet.settle()
    assert (fleet.count("a"), fleet.count("b")) == (1, 3)


def test_equal_priorities_do_not_take_second_replicas_from_each_other():
    fleet = fleet_of(4, memory=GIB)
    fleet.ask("a", load=30)
    fleet.settle()
    fleet.ask("b", load=60)
    fleet.settle()
    assert (fleet.count("a"), fleet.count("b")) == (3, 1)


def test_a_minimum_is_kept_and_gets_room():
    fleet = fleet_of(2, memory=GIB)
    fleet.settings["a"] = ModelSettings("a", minimum=1)
    fleet.settle()
    fleet.ask("b", load=30)
    fleet.ask("c")
    for _ in range(100):
        fleet.step()
        assert fleet.count("a") == 1
    fleet.settings["c"] = ModelSettings("c", minimum=1)
    fleet.leave("b")
    fleet.step(EVICT_AFTER)
    fleet.settle()
    assert (fleet.count("a"), fleet.count("b"), fleet.count("c")) == (1, 0, 1)


def test_a_pinned_worker_holds_it_and_others_let_go():
    fleet = fleet_of(5)
    fleet.ask("a")
    fleet.settle()
    (before,) = fleet.where("a")
    pinned = next(name for name in fleet.workers if name != before)
    fleet.settings["a"] = ModelSettings("a", pinned=(pinned, "unknown"))
    fleet.settle()
    assert fleet.where("a") == [pinned]
    fleet.leave("a")
    fleet.step(IDLE_AFTER)
    fleet.settle()
    assert fleet.where("a") == [pinned]


def test_a_pinned_worker_makes_room():
    fleet = fleet_of(1, memory=GIB)
    fleet.ask("b")
    fleet.settle()
    fleet.leave("b")
    fleet.settings["a"] = ModelSettings("a", pinned=("w0",))
    fleet.step(max(EVICT_AFTER, LEAST_STAY))
    fleet.settle()
    assert fleet.where("a") == ["w0"]


@pytest.mark.parametrize("minimum", [0, 1])
def test_a_pin_to_a_worker_that_is_too_small_keeps_the_model_from_nobody(minimum):
    fleet = ToyFleet()
    fleet.add("small", GIB // 2, ABLE)
    fleet.add("other", GIB, ABLE)
    fleet.settings["a"] = ModelSettings("a", minimum=minimum, pinned=("small",))
    fleet.settle()
    assert fleet.count("a") == minimum
    fleet.ask("a")
    fleet.settle()
    assert fleet.where("a") == ["other"]
    fleet.leave("a")
    fleet.step(IDLE_AFTER)
    fleet.settle()
    assert fleet.count("a") == minimum


def test_a_pin_that_has_to_wait_is_stood_in_for():
    fleet = ToyFleet()
    fleet.add("taken", GIB, ABLE, "b")
    fleet.add("other", GIB, ABLE)
    fleet.settings["a"] = ModelSettings("a", pinned=("taken",))
    fleet.settle()
    assert fleet.where("a") == ["other"]
    fleet.remove("taken")
    fleet.add("taken", GIB, ABLE)
    fleet.settle()
    assert fleet.where("a") == ["taken"]


def test_a_slow_drain_does_not_hold_up_room_elsewhere():
    fleet = full_of_a_and_b()
    fleet.drain = 1000
    fleet.leave("a")
    fleet.leave("b")
    fleet.pass_time(EVICT_AFTER)
    fleet.ask("c")
    assert len(fleet.step()) == 1
    for _ in range(4):
        assert fleet.step() == []
    assert len(fleet.step()) == 1


def two_replicas(first: str, second: str, **more: object) -> Snapshot:
    """`a` on w1 (lease 0) and on w2 (lease 1), in these states; `b` fits in the place of either."""
    able = {"a": GIB, "b": GIB}
    states = {"w1": first, "w2": second}
    return Snapshot(
        workers=tuple(
            WorkerView(name, GIB, able, (Holding("a", state, START - 50, memory=GIB),))
            for name, state in states.items()
        ),
        leases=(LeaseView("a", 0, "w1"), LeaseView("a", 1, "w2")),
        **more,
    )


def test_a_replica_too_many_finishes_loading_before_it_goes():
    limit = {"a": ModelSettings("a", maximum=1)}
    assert decide(two_replicas("ready", "loading", settings=limit), START).actions == ()
    (action,) = decide(two_replicas("ready", "ready", settings=limit), START).actions
    assert (action.kind, action.worker) == ("demote", "w2")


@pytest.mark.parametrize(("first", "makes_room"), [("loading", False), ("ready", True)])
def test_a_second_replica_makes_room_only_where_the_first_one_serves(first, makes_room):
    demand = {
        "a": Demand(running=4, load=4, sustained=4, last_use=START),
        "b": Demand(waiting=1, waiting_since=START - 1, last_use=START),
    }
    actions = decide(two_replicas(first, "ready", demand=demand), START).actions
    assert [(action.kind, action.worker) for action in actions] == [("demote", "w2")] * makes_room


def test_what_makes_room_is_not_adopted_as_well():
    fleet = full_of_a_and_b()
    fleet.leave("b")
    fleet.pass_time(EVICT_AFTER)
    fleet.leases.clear()
    fleet.ask("c")
    actions = decide(fleet.snapshot(), fleet.now).actions
    assert sorted((action.kind, action.model) for action in actions) == [
        ("adopt", "a"),
        ("demote", "b"),
    ]
    fleet.settle()
    assert (fleet.count("a"), fleet.count("b"), fleet.count("c")) == (1, 0, 1)
