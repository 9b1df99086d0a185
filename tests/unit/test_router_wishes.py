"""How many workers are wished for, as metrics tell it."""

from types import SimpleNamespace

import pytest

from router.metrics import Metrics
from router.wishes import FRESH, Wishes, snapshot_of
from shared.demand import Demand
from shared.presence import Beat, LoadableModel
from shared.snapshot import ModelSettings

GIB = 1 << 30


def beat(name="w", *models, state="ready", memory=8 * GIB, able=("m", "n")):
    loadable = tuple(
        LoadableModel(model, 2 * GIB, 512, 4, GIB, 1, aliases=(f"{model}-alias",)) for model in able
    )
    return Beat(name, state, 1, models, able=loadable, memory_budget=memory)


def waiting(count=3):
    return Demand(requests=count, waiting=count, waiting_since=99.0, last_use=100.0)


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def fleet(clock):
    """What a router knows, and the wishes that follow from it."""

    known = SimpleNamespace(beats=[beat()], demand={"m": waiting()}, settings={})
    known.wishes = Wishes(lambda: known.beats, lambda: known.demand, lambda: known.settings, clock)
    return known


def test_a_snapshot_does_not_depend_on_the_order_of_beats():
    beats = [beat("b"), beat("a", able=("m",))]
    one, other = snapshot_of(beats, {}, {}), snapshot_of(reversed(beats), {}, {})

    assert one == other
    assert one.slots == {"m": 4, "n": 4}


def test_what_is_asked_for_and_can_be_loaded_is_wanted(fleet):
    assert fleet.wishes.current().by_model.get("m") == 1
    assert fleet.wishes.current().workers == 1


def test_a_name_that_somebody_made_up_wants_nothing(fleet):
    fleet.demand = {"made-up": waiting()}

    assert fleet.wishes.current().by_model.get("made-up", 0) == 0
    assert fleet.wishes.current().workers == 0


def test_minimums_are_wanted(fleet):
    fleet.demand, fleet.settings = {}, {"n": ModelSettings("n", minimum=2)}

    assert fleet.wishes.current().by_model["n"] == 2
    assert fleet.wishes.current().workers == 2


def test_a_fleet_of_nobody_still_knows_what_it_could_serve(fleet, clock):
    fleet.demand = {}
    assert fleet.wishes.current().workers == 0
    clock.now += FRESH
    fleet.beats, fleet.demand = [], {"m": waiting()}

    assert fleet.wishes.current().workers == 1


def test_it_is_computed_once_a_second_and_after_a_clock_was_set_back(fleet, clock):
    assert fleet.wishes.current().workers == 1
    fleet.demand = {}
    clock.now += FRESH / 2
    assert fleet.wishes.current().workers == 1
    clock.now -= 50
    assert fleet.wishes.current().workers == 0


def test_gauges_show_it(fleet):
    text = Metrics(lambda _: True, lambda: True, wishes=fleet.wishes.current).render().decode()

    assert 'mesh_wanted_replicas{model="m"} 1.0' in text
    assert "mesh_wanted_workers 1.0" in text
