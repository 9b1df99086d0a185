"""How many workers are wished for, by model and packed by memory."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.demand import Demand
from shared.snapshot import Holding, LeaseView, ModelSettings, Snapshot, WorkerView
from shared.wish import pack, wish

NOW = 1_800_000_000.0
GIB = 1 << 30
COSTS = {"a": GIB, "b": 2 * GIB, "c": 3 * GIB}


def waiting(count: int = 1) -> Demand:
    return Demand(waiting=count, waiting_since=NOW, last_use=NOW)


def running(load: float) -> Demand:
    return Demand(running=round(load), load=load, sustained=load, last_use=NOW)


def test_from_zero_one_worker_for_a_model_that_is_asked_for():
    snapshot = Snapshot((), demand={"a": waiting(50)})
    found = wish(snapshot, NOW, usual_memory=8 * GIB, costs=COSTS)
    assert found == ({"a": 1}, 1)


def test_nobody_asks_and_nothing_is_wished():
    assert wish(Snapshot(()), NOW, usual_memory=GIB, costs=COSTS) == ({}, 0)


def test_names_that_were_made_up_bring_no_machine_up():
    snapshot = Snapshot((), demand={"made-up": waiting(), "a": waiting()})
    assert wish(snapshot, NOW, usual_memory=GIB, costs=COSTS) == ({"a": 1}, 1)


def test_minimums_count_without_demand_and_without_known_cost():
    snapshot = Snapshot((), settings={"x": ModelSettings("x", minimum=2)})
    assert wish(snapshot, NOW, usual_memory=GIB, costs={}) == ({"x": 2}, 2)


def test_a_pool_is_asked_for_all_at_once_and_at_most_the_maximum():
    able = {"a": GIB}
    workers = (WorkerView("w1", GIB, able, (Holding("a", "ready", NOW - 99, 8, GIB),)),)
    leases = (LeaseView("a", 0, "w1"),)
    snapshot = Snapshot(workers, leases, demand={"a": running(70)})
    assert wish(snapshot, NOW, usual_memory=GIB, costs={}).by_model == {"a": 10}
    capped = Snapshot(workers, leases, {"a": ModelSettings("a", maximum=4)}, snapshot.demand)
    assert wish(capped, NOW, usual_memory=GIB, costs={}) == ({"a": 4}, 4)


def test_an_idle_model_is_wished_away():
    workers = (WorkerView("w1", GIB, {"a": GIB}, (Holding("a", "ready", NOW - 99, 0, GIB),)),)
    snapshot = Snapshot(workers, demand={"a": Demand(requests=1, last_use=NOW - 61)})
    assert wish(snapshot, NOW, usual_memory=GIB, costs={}) == ({"a": 0}, 0)


def test_the_usual_size_is_the_median_of_those_there():
    workers = tuple(WorkerView(f"w{n}", size * GIB, {"a": GIB}) for n, size in enumerate((2, 4, 9)))
    demand = {model: waiting() for model in "abc"}
    found = wish(Snapshot(workers, demand=demand), NOW, usual_memory=GIB, costs=COSTS)
    assert found.workers == 2


def test_two_replicas_of_one_model_are_two_workers():
    assert pack({"a": 3, "b": 1}, COSTS, 64 * GIB) == 3


def test_what_fits_nowhere_takes_a_worker_of_its_own():
    assert pack({"c": 2, "a": 1}, COSTS, 2 * GIB) == 3


@pytest.mark.parametrize(("counts", "workers"), [((3, 3, 0), 3), ((0, 3, 3), 6), ((6, 0, 2), 6)])
def test_packing(counts: tuple[int, int, int], workers: int):
    assert pack(dict(zip("abc", counts, strict=True)), COSTS, 4 * GIB) == workers


@given(
    st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 30)),
    st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 120)),
    st.integers(1, 100),
)
def test_packing_is_between_its_bounds(replicas: dict, costs: dict, memory: int):
    found = pack(replicas, costs, memory)
    whole = {model: min(memory, costs.get(model, memory)) for model in replicas}
    needed = sum(count * whole[model] for model, count in replicas.items())
    assert max([0, *replicas.values()]) <= found <= sum(replicas.values())
    assert found * memory >= needed
