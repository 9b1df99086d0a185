"""What `mesh top` makes of what it hears."""

import time

import pytest
from rich.console import Console, RenderableType

from mesh.fleet import Fleet
from mesh.tables import demand_table
from mesh.top import Picture
from shared.demand import Demand, DemandEntry, encode_entry
from shared.kv import Entry
from shared.ledger import FORGET
from shared.presence import Beat, RouterBeat, encode_beat


def drawn(view: RenderableType) -> str:
    console = Console(width=200, highlight=False)
    with console.capture() as captured:
        console.print(view)
    return captured.get()


def entry(model: str, waiting: int, at: float, revision: int = 1) -> Entry:
    told = DemandEntry(model, "router-1", at, waiting=waiting, last_use=at)
    return Entry(f"{model}.router-1", encode_entry(told), revision)


def test_what_is_waited_for_most_comes_first() -> None:
    demand = {
        "calm": Demand(running=1, load=0.5, last_use=90.0),
        "wanted": Demand(waiting=7, last_use=100.0),
        "busy": Demand(running=9, load=8.0, tokens=1000.0, last_use=100.0),
    }
    text = drawn(demand_table(demand, {"busy": ["worker-1", "worker-2"]}, 100.0))
    assert text.index("wanted") < text.index("busy") < text.index("calm")
    assert "worker-1, worker-2" in text
    # 1000 tokens with a half-life of 30 s come from 1000 * ln 2 / 30 a second.
    assert " 23 " in text


def test_those_who_are_silent_are_forgotten() -> None:
    now = [0.0]
    fleet = Fleet(clock=lambda: now[0])
    fleet.hear(encode_beat(Beat("worker-1", "ready", 1)))
    fleet.hear_router(encode_beat(RouterBeat("router-1", 1)))
    now[0] = 2.0
    fleet.hear(encode_beat(Beat("worker-2", "ready", 1)))
    fleet.forget_silent(1.5)
    assert (set(fleet.workers), set(fleet.routers)) == ({"worker-2"}, set())


def test_a_picture_has_beats_demand_and_leases() -> None:
    picture = Picture()
    now = time.time()
    picture.fleet.hear(encode_beat(Beat("worker-1", "ready", 1)))
    picture.demand.hear(entry("m", 3, now))
    picture.demand.hear(entry("old", 1, now - 2 * FORGET))
    picture.hear_lease(Entry("m.0", b'{"worker":"worker-9","since":1,"renewed":1}', 1))
    text = drawn(picture.view())
    assert all(word in text for word in ("worker-1", "m", "worker-9"))
    assert "old" not in text
    assert "NATS is away" in drawn(picture.view("NATS is away"))


@pytest.mark.parametrize(
    "late",
    [entry("m", 9, 0.0, revision=3), Entry("m.router-1", b"no entry", 5)],
)
def test_what_is_older_or_no_entry_is_not_shown(late: Entry) -> None:
    picture = Picture()
    picture.demand.hear(entry("m", 4321, time.time(), revision=4))
    picture.demand.hear(late)
    assert ("4321" in drawn(picture.view())) == (late.revision < 4)
