"""The router's view of the fleet: pools that follow beats, and what each model's state is."""

import pytest

from router.fleet import EXPIRY, Fleet
from shared.presence import Beat, LoadableModel, ModelState


def ready(name="m", free=4, **more):
    return ModelState(name, more.pop("state", "ready"), slots=4, free=free, context=100, **more)


def able(name, aliases=(), **more):
    return LoadableModel(name, 10, 200, 4, 30, 7, aliases=aliases, **more)


class Worker:
    def __init__(self, fleet, name="w"):
        self.fleet, self.name, self.sequence = fleet, name, 0

    def beat(self, *models, state="ready", able=(), now=0.0):
        self.sequence += 1
        return self.fleet.observe(
            Beat(self.name, state, self.sequence, models, started=1.0, able=able), now
        )


@pytest.fixture
def fleet():
    return Fleet()


@pytest.fixture
def worker(fleet):
    return Worker(fleet)


def test_a_pool_follows_what_beats_say(fleet, worker):
    assert fleet.pool("m") is None
    worker.beat(ready(free=1))
    pool = fleet.pool("m")
    assert (pool.candidates, pool.free) == (1, 1)
    worker.beat(ready(free=3), ready("n"))
    assert fleet.pool("m") is pool
    assert (pool.free, fleet.served()) == (3, ["m", "n"])
    worker.beat(ready("n"))
    assert (fleet.pool("m"), fleet.served()) == (None, ["n"])


@pytest.mark.parametrize("end", ["gone", "silent", "draining", "not ready"])
def test_a_worker_that_serves_no_more_is_in_no_pool(fleet, worker, end):
    worker.beat(ready())
    if end == "gone":
        assert not worker.beat(state="gone")
    elif end == "silent":
        assert fleet.expire(EXPIRY + 0.1) == ["w"]
    elif end == "draining":
        worker.beat(ready(), state="draining")
    else:
        worker.beat(ready(state="draining"))

    assert fleet.pool("m") is None
    assert fleet.knows("m")
    assert fleet.distances.rtt("w") is None


def test_who_left_is_as_far_as_one_never_met(fleet, worker):
    worker.beat(ready())
    fleet.distances.observe("w", 0.2)
    worker.beat(state="gone")

    assert fleet.distances.reach("w") == "unknown"


def test_an_older_beat_changes_nothing(fleet, worker):
    worker.beat(ready())
    worker.sequence -= 2
    worker.beat()

    assert fleet.served() == ["m"]


@pytest.mark.parametrize(
    ("models", "loadable", "state"),
    [
        ((ready(),), (), "ready"),
        ((ready(state="draining"),), (able("m"),), "draining"),
        ((ready(state="loading"),), (able("m"),), "loading"),
        ((), (able("m"),), "loadable"),
        ((ready(state="failed"),), (able("m"),), "loadable"),
        ((ready(state="failed"),), (), "failed"),
    ],
)
def test_the_best_that_anybody_says_is_the_state(fleet, worker, models, loadable, state):
    worker.beat(*models, able=loadable)

    assert fleet.model("m").state == state
    assert fleet.models() == [fleet.model("m")]


def test_a_model_that_was_served_stays_known(fleet, worker):
    worker.beat(ready(created=5, size=9))
    worker.beat()

    view = fleet.model("m")
    assert (view.state, view.workers, view.context, view.created) == ("unavailable", 0, 100, 5)
    assert fleet.model("never") is None


def test_a_loadable_model_and_its_aliases_are_listed(fleet, worker):
    worker.beat(able=(able("m", aliases=("a",), embeddings=False),))

    assert [view.name for view in fleet.models()] == ["a", "m"]
    view = fleet.model("a")
    assert (view.context, view.created, view.size, view.embeddings) == (200, 7, 30, False)
    assert fleet.canonical("a") == ("m", True)
    assert fleet.canonical("m") == ("m", True)
    assert fleet.canonical("never") == ("never", False)
    assert fleet.knows("a")


def test_an_alias_counts_as_its_model_when_the_last_worker_has_left(fleet, worker):
    worker.beat(able=(able("m", aliases=("a",)),))
    worker.beat(state="gone")

    assert fleet.canonical("a") == ("m", True)
    assert fleet.loadable("a") is None


def test_hope_is_a_worker_that_loads_or_could_and_has_not_failed(fleet, worker):
    assert not fleet.hopeful("m")
    worker.beat(able=(able("m"),))
    assert fleet.hopeful("m")
    worker.beat(ready(state="failed", detail="broken"), able=(able("m"),))
    assert not fleet.hopeful("m")
    assert fleet.failure("m") == "broken"
    other = Worker(fleet, "v")
    other.beat(ready(state="loading"))
    assert fleet.hopeful("m")
