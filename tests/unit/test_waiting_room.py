"""The waiting room: bounded, in order, and let in as there is room."""

import pytest

from router.fleet import Fleet
from router.waiting import HOPELESS, WaitingRoom
from shared.errors import Unavailable
from shared.presence import Beat, LoadableModel, ModelState


class Request:
    def __init__(self, name):
        self.name = name
        self.told = []

    def resume(self):
        self.told.append("go")

    def refuse(self, error):
        self.told.append(error.message)


@pytest.fixture
def fleet():
    return Fleet()


@pytest.fixture
def room(fleet):
    return WaitingRoom(fleet, per_model=3, in_all=4)


def beat(fleet, number, *models, able=(), state="ready"):
    names = tuple(LoadableModel(name, 1, 1, 1, 1, 1) for name in able)
    fleet.observe(Beat("w", state, number, models, able=names), 0.0)


def ready(name, free):
    return ModelState(name, "ready", slots=4, free=free)


def test_as_many_go_on_as_there_is_room_and_the_first_go_first(fleet, room):
    requests = [Request(number) for number in range(3)]
    for request in requests:
        room.enter("m", request)
    room.look(["m"])
    beat(fleet, 1, ready("m", free=2))
    room.look(["m", "other"])

    assert [request.told for request in requests] == [["go"], ["go"], []]
    assert (len(room), room.counts()) == (1, {"m": 1})


def test_one_that_found_no_room_is_the_first_again_even_above_the_bound(fleet, room):
    early, late = Request("early"), Request("late")
    for request in (late, Request(1), Request(2)):
        room.enter("m", request)
    room.enter("m", early, again=True)
    beat(fleet, 1, ready("m", free=1))
    room.look(["m"])

    assert (early.told, late.told) == (["go"], [])


def test_the_bounds_hold_for_a_model_and_in_all(room):
    for number in range(3):
        room.enter("m", Request(number))
    with pytest.raises(Unavailable, match="3 requests wait"):
        room.enter("m", Request("more"))
    room.enter("n", Request("n"))
    with pytest.raises(Unavailable) as refused:
        room.enter("o", Request("o"))

    assert refused.value.retry_after == 10
    assert room.counts() == {"m": 3, "n": 1}


def test_who_leaves_makes_room_and_may_leave_twice(room):
    requests = [Request(number) for number in range(3)]
    for request in requests:
        room.enter("m", request)
    room.leave("m", requests[1])
    room.leave("m", requests[1])
    room.leave("nobody", requests[1])

    assert len(room) == 2
    room.enter("m", requests[1])
    assert len(room) == 3


def sweep(room, now):
    room.sweep(now, lambda model: Unavailable(f"no {model}"))


def test_those_who_wait_in_vain_are_told_after_a_while(fleet, room):
    request = Request("r")
    beat(fleet, 1, able=["m"], state="standby")
    room.enter("m", request)
    sweep(room, 0.0)
    beat(fleet, 2, state="standby")
    sweep(room, 100.0)
    sweep(room, 100.0 + HOPELESS)
    assert request.told == []
    sweep(room, 100.1 + HOPELESS)

    assert request.told == ["no m"]
    assert len(room) == 0


def test_hope_that_comes_back_begins_the_wait_anew(fleet, room):
    request = Request("r")
    room.enter("m", request)
    sweep(room, 0.0)
    beat(fleet, 1, ModelState("m", "loading"))
    sweep(room, HOPELESS + 1)
    beat(fleet, 2)
    sweep(room, HOPELESS + 2)
    sweep(room, 2 * HOPELESS + 1)

    assert request.told == []


def test_patience_for_workers_that_have_to_be_started():
    room = WaitingRoom(Fleet(), per_model=1, in_all=1, patience=60.0)
    request = Request("r")
    room.enter("m", request)
    sweep(room, 0.0)
    sweep(room, 59.0)
    assert request.told == []
    sweep(room, 61.0)
    assert request.told == ["no m"]


def test_progress_is_one_line_of_the_worker_that_says_most(fleet, room):
    assert room.progress("m") == "waiting for a worker"
    beat(fleet, 1, ModelState("m", "loading", detail="downloading\r\n 3 of 9 MB"))
    assert room.progress("m") == "loading: downloading 3 of 9 MB"
    fleet.observe(Beat("v", "loading", 1, (ModelState("m", "loading", detail="loading 7%"),)), 0.0)
    assert room.progress("m") == "loading 7%"
