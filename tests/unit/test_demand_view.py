"""What is known of everybody's demand follows what was written last, and by whom."""

import pytest

from shared import subjects
from shared.demand import DemandEntry, encode_entry
from shared.demand_view import DemandView
from shared.kv import Entry
from shared.ledger import FORGET

NOW = 1_000_000.0


def written(model, router, revision, *, requests=1.0, at=NOW, key=None):
    entry = DemandEntry(model, router, at, requests=requests)
    return Entry(key or subjects.demand_key(model, router), encode_entry(entry), revision)


def requests(view, now=NOW):
    return {model: demand.requests for model, demand in view.total(now).items()}


def test_the_last_write_of_each_router_counts():
    view = DemandView()
    view.hear(written("m", "r1", 5, requests=6))
    view.hear(written("m", "r2", 6, requests=6))
    assert view.hear(written("m", "r1", 4, requests=60)) is None
    assert requests(view) == {"m": 12}
    assert [entry.router for entry in view.of("r2")] == ["r2"]


def test_after_a_bucket_was_made_anew_its_low_numbers_count():
    view = DemandView()
    view.hear(written("m", "r1", 900))
    view.begin_anew()
    assert requests(view) == {"m": 1}, "what is known stands until it is written again"
    view.hear(written("m", "r1", 1, requests=7))
    assert requests(view) == {"m": 7}


@pytest.mark.parametrize(
    "newer",
    [
        pytest.param(Entry("m.r1", None, 2), id="deleted"),
        pytest.param(Entry("m.r1", b"no entry", 2), id="unreadable"),
        pytest.param(written("m", "r9", 2, key="m.r1"), id="in another's name"),
    ],
)
def test_what_was_deleted_or_cannot_be_believed_leaves_nothing(newer):
    view = DemandView()
    view.hear(written("m", "r1", 1))
    assert view.hear(newer) is None
    assert requests(view) == {}


def test_a_router_that_died_with_requests_waiting_is_forgotten_in_time():
    view = DemandView()
    entry = DemandEntry("m", "r1", NOW, waiting=3, waiting_since=NOW, last_use=NOW)
    view.hear(Entry("m.r1", encode_entry(entry), 1))
    assert view.total(NOW)["m"].waiting == 3
    assert view.total(NOW + FORGET + 1) == {}
    assert view.of("r1") == []
