"""What a worker makes of what it hears."""

from collections.abc import Callable
from itertools import permutations

import msgspec
import pytest

from shared import subjects
from shared.bus import BusMessage
from shared.demand import DemandEntry, encode_entry
from shared.kv import LEASE_SECONDS, Entry
from shared.leases import LeaseTable
from shared.ledger import FORGET
from shared.presence import Beat, LoadableModel, ModelState, encode_beat
from shared.settings import SettingsView, encode_settings
from shared.sighting import slots_of, view_of
from shared.snapshot import ModelSettings
from worker.outlook import LEAST_PAUSE, MISSED, MOST_HEARD, Outlook

NOW = 1_000_000.0
ABLE = (
    LoadableModel("a", 100, 1024, 4, 50, 0, aliases=("first",)),
    LoadableModel("b", 200, 1024, 8, 90, 0),
)
ME = Beat("me", "standby", 1, able=ABLE, memory_budget=1000)


class Clock:
    def __init__(self) -> None:
        self.passed = 0.0

    def monotonic(self) -> float:
        return 50.0 + self.passed

    def wall(self) -> float:
        return NOW + self.passed


class Heard:
    def __init__(self) -> None:
        self.clock = Clock()
        self.table = LeaseTable()
        self.poked = 0
        self.outlook = Outlook(
            "me",
            self.table,
            on_demand=self.poke,
            clock=self.clock.monotonic,
            wall=self.clock.wall,
        )
        self.revision = 0

    def poke(self) -> None:
        self.poked += 1

    def beat(self, beat: Beat, key: str = "") -> None:
        self.revision += 1
        entry = Entry(key or beat.worker, encode_beat(beat), self.revision)
        self.outlook.hear_worker(entry)

    def demand(self, model: str, router: str = "r", revision: int = 0, **fields: float) -> None:
        self.revision += 1
        entry = DemandEntry(model, router, self.clock.wall(), **fields)  # type: ignore[arg-type]
        key = subjects.demand_key(model, router)
        written = Entry(key, encode_entry(entry), revision or self.revision)
        self.outlook.hear_demand(written)

    def announce(self, *settings: ModelSettings, revision: int = 0) -> None:
        told = {"router": "r", "revision": revision, "settings": settings}
        data = msgspec.json.encode(told)
        self.outlook.settings.announced(BusMessage(subjects.SETTINGS, "", data))


@pytest.fixture
def heard() -> Heard:
    return Heard()


def test_a_worker_is_seen_with_what_it_holds_under_its_own_names() -> None:
    models = (
        ModelState("a", "ready", slots=4, memory=90, busy=2, since=3.0, pinned=True),
        ModelState("first", "ready", slots=4, memory=90, busy=2, alias_of="a"),
        ModelState("b", "failed", memory=200),
    )
    view = view_of(msgspec.structs.replace(ME, state="ready", models=models), {"a": 100})
    assert (view.name, view.memory, view.able, view.open) == ("me", 1000, {"a": 100}, True)
    (held,) = view.holds
    assert (held.model, held.state, held.busy, held.memory) == ("a", "ready", 2, 90)
    assert (held.since, held.pinned) == (3.0, True)


@pytest.mark.parametrize(("state", "takes"), [("standby", True), ("draining", False)])
def test_who_ends_takes_no_roles(state: str, takes: bool) -> None:
    assert view_of(msgspec.structs.replace(ME, state=state), {}).open is takes


def test_workers_are_seen_until_they_are_silent_or_gone(heard: Heard) -> None:
    other = msgspec.structs.replace(ME, worker="other")
    heard.beat(other)
    heard.beat(msgspec.structs.replace(ME, worker="third"))
    heard.beat(ME)
    heard.beat(msgspec.structs.replace(ME, worker="forged"), key="innocent")
    seen = heard.outlook.snapshot(ME).workers
    assert [worker.name for worker in seen] == ["me", "other", "third"]
    # Those that are alike share what they could load.
    assert seen[0].able is seen[1].able
    assert seen[0].able == {"a": 100, "b": 200}
    heard.beat(msgspec.structs.replace(ME, worker="third", state="gone"))
    heard.clock.passed = MISSED * LEAST_PAUSE
    heard.beat(other)
    heard.clock.passed += MISSED * LEAST_PAUSE
    assert [worker.name for worker in heard.outlook.snapshot(ME).workers] == ["me", "other"]
    heard.clock.passed += 0.1
    assert [worker.name for worker in heard.outlook.snapshot(ME).workers] == ["me"]


def test_in_a_large_fleet_beats_come_less_often(heard: Heard) -> None:
    assert heard.outlook.pause == LEAST_PAUSE
    for number in range(2000):
        heard.beat(Beat(f"w{number}", "standby", 1))
    assert heard.outlook.pause * MOST_HEARD == pytest.approx(2001)


def test_demand_is_summed_by_model_and_the_last_of_each_router_counts(heard: Heard) -> None:
    heard.demand("a", "r1", waiting=2, waiting_since=NOW)
    heard.demand("a", "r2", running=1, last_use=NOW)
    heard.demand("a", "r1", waiting=3, waiting_since=NOW)
    demand = heard.outlook.snapshot(ME).demand["a"]
    assert (demand.waiting, demand.running) == (3, 1)
    # An older revision that comes late.
    heard.demand("a", "r1", revision=1, waiting=9)
    assert heard.outlook.snapshot(ME).demand["a"].waiting == 3
    assert heard.poked == 2


def test_demand_is_forgotten_in_time_and_when_it_is_deleted(heard: Heard) -> None:
    heard.demand("a", waiting=1)
    heard.demand("b", waiting=1)
    heard.outlook.hear_demand(Entry(subjects.demand_key("a", "r"), None, 100))
    assert set(heard.outlook.snapshot(ME).demand) == {"b"}
    heard.clock.passed = FORGET + 1
    assert heard.outlook.snapshot(ME).demand == {}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("a.r", b"nothing"),
        ("b.r", encode_entry(DemandEntry("a", "r", NOW))),
        ("a.s", encode_entry(DemandEntry("a", "r", NOW))),
        ("a", encode_entry(DemandEntry("a", "r", NOW))),
    ],
)
def test_demand_that_cannot_be_or_is_another_s_is_ignored(
    heard: Heard, key: str, value: bytes
) -> None:
    heard.outlook.hear_demand(Entry(key, value, 1))
    assert heard.outlook.snapshot(ME).demand == {}


def test_live_leases_are_seen(heard: Heard) -> None:
    lease = b'{"worker":"other","since":5.0,"renewed":6.0,"state":"ready"}'
    heard.table.hear(Entry("a.1", lease, 1), heard.clock.monotonic())
    (seen,) = heard.outlook.snapshot(ME).leases
    assert (seen.model, seen.replica, seen.worker, seen.state) == ("a", 1, "other", "ready")
    heard.clock.passed = LEASE_SECONDS + 0.1
    assert heard.outlook.snapshot(ME).leases == ()


def test_slots_are_those_that_are_set_up_else_those_that_are_promised(heard: Heard) -> None:
    ready = ModelState("a", "ready", slots=2)
    heard.beat(Beat("other", "ready", 1, models=(ready,), able=ABLE))
    assert heard.outlook.snapshot(ME).slots == {"a": 2, "b": 8}


def test_where_workers_differ_all_see_the_same_slots() -> None:
    beats = [Beat(f"w{n}", "ready", 1, (ModelState("a", "ready", slots=n),)) for n in (1, 2, 3)]
    assert {slots_of(order)["a"] for order in permutations(beats)} == {3}


def test_nothing_is_decided_before_all_could_be_heard(heard: Heard) -> None:
    heard.clock.passed = 100.0
    assert not heard.outlook.complete
    heard.announce()
    assert heard.outlook.complete
    heard.outlook.reconnected()
    heard.announce()
    assert not heard.outlook.complete
    heard.clock.passed += 5.0
    assert heard.outlook.complete


def write(settings: ModelSettings) -> Callable[[int], Entry]:
    return lambda revision: Entry(
        subjects.model_key(settings.model), encode_settings(settings), revision
    )


def test_settings_are_those_told_last() -> None:
    view = SettingsView()
    view.hear(write(ModelSettings("a/b", minimum=1))(5))
    assert view.settings["a/b"].minimum == 1
    assert not view.known
    # A router that has not heard of it yet.
    old = msgspec.json.encode({"router": "r", "revision": 4, "settings": []})
    view.announced(BusMessage(subjects.SETTINGS, "", old))
    assert view.settings["a/b"].minimum == 1
    assert not view.known
    all_of_it = {"router": "r", "revision": 5, "settings": [ModelSettings("c", minimum=2)]}
    view.announced(BusMessage(subjects.SETTINGS, "", msgspec.json.encode(all_of_it)))
    assert view.known
    assert set(view.settings) == {"c"}
    view.hear(Entry("c", None, 6))
    assert view.settings == {}
    view.hear(write(ModelSettings("c", minimum=9))(3))
    assert view.settings == {}


@pytest.mark.parametrize("value", [b"", b"[]", b'{"model":1}'])
def test_settings_that_cannot_be_read_change_nothing(value: bytes) -> None:
    view = SettingsView()
    view.hear(write(ModelSettings("a", minimum=1))(1))
    view.hear(Entry("a", value, 2))
    view.announced(BusMessage(subjects.SETTINGS, "", value))
    assert view.settings["a"].minimum == 1
