"""Demand: exact sums of what routers counted, decayed to one moment; the router's own ledger."""

import math
import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.demand import (
    HALF_LIFE,
    LOAD_HALF_LIFE,
    REFRESH,
    STALE,
    SUSTAINED_HALF_LIFE,
    Demand,
    DemandEntry,
    brought_to,
    decode_entry,
    encode_entry,
    total,
)
from shared.ledger import FORGET, LEAST_PAUSE, MOST_UNKNOWN, UNKNOWN_KEPT, DemandLedger

START = 1_800_000_000.0

amounts = st.floats(0, 1e6, allow_nan=False)
few = st.integers(0, 100)
moments = st.floats(START, START + 1000)
entries = st.builds(
    DemandEntry,
    model=st.sampled_from(["a", "b/c:d"]),
    router=st.sampled_from(["r1", "r2", "r3"]),
    at=moments,
    requests=amounts,
    tokens=amounts,
    waiting=few,
    waiting_since=moments,
    running=few,
    load=amounts,
    sustained=amounts,
    last_use=moments,
)


def ledger_with(requests: int, router: str = "r1", now: float = START) -> DemandLedger:
    ledger = DemandLedger(router)
    for _ in range(requests):
        ledger.requested("a", now)
    return ledger


def told(ledger: DemandLedger, now: float) -> list[DemandEntry]:
    """What others would have received: through the wire form."""
    return [decode_entry(encode_entry(entry)) for entry in ledger.due(now)]


def test_five_routers_with_six_requests_each_read_thirty():
    found = [entry for n in range(5) for entry in told(ledger_with(6, f"r{n}"), START)]
    assert total(found, START)["a"].requests == 30.0


def test_all_routers_restarted_still_thirty_less_decay():
    stored = {e.router: e for n in range(5) for e in told(ledger_with(6, f"r{n}"), START)}
    later = START + HALF_LIFE
    for name in list(stored):
        successor = DemandLedger(name)
        successor.take_over(stored.values(), later)
        stored |= {entry.router: entry for entry in told(successor, later)}
    assert all(entry.at == later for entry in stored.values())
    assert total(stored.values(), later)["a"].requests == pytest.approx(15.0, abs=1e-9)


def test_what_was_counted_before_taking_over_is_kept():
    (old,) = told(ledger_with(6), START)
    successor = ledger_with(2, now=START + HALF_LIFE)
    successor.take_over([old], START + HALF_LIFE)
    entry = successor.entry("a", START + HALF_LIFE)
    assert entry is not None
    assert entry.requests == pytest.approx(5.0)


def test_entries_of_other_routers_and_very_old_ones_are_not_taken_over():
    (old,) = told(ledger_with(6), START)
    for name, later in (("r2", 1.0), ("r1", FORGET + 1)):
        successor = DemandLedger(name)
        successor.take_over([old], START + later)
        assert len(successor) == 0


@given(st.lists(entries, min_size=1, max_size=30), moments, st.randoms())
def test_order_does_not_matter(found: list[DemandEntry], now: float, rng: random.Random):
    shuffled = list(found)
    rng.shuffle(shuffled)
    assert total(found, now) == total(shuffled, now)


@given(entries, moments)
def test_an_entry_never_grows(entry: DemandEntry, now: float):
    later = brought_to(entry, now)
    assert later.requests <= entry.requests
    assert later.tokens <= entry.tokens
    assert later.load <= max(entry.load, entry.running)
    assert later.sustained <= max(entry.sustained, entry.running)
    if now <= entry.at:
        assert later == entry


@given(entries, st.floats(0, STALE / 2), st.floats(0, STALE / 2))
def test_two_steps_are_as_one(entry: DemandEntry, first: float, second: float):
    """Up to `STALE`, which is counted from what the router itself said."""
    end = entry.at + first + second
    once, twice = brought_to(entry, end), brought_to(brought_to(entry, entry.at + first), end)
    for name in ("requests", "tokens", "load", "sustained"):
        assert getattr(once, name) == pytest.approx(getattr(twice, name), rel=1e-6, abs=1e-5)


def test_a_dead_router_neither_waits_nor_runs_for_ever():
    entry = DemandEntry("a", "r1", START, waiting=3, waiting_since=START, running=4)
    alive, dead = brought_to(entry, START + STALE), brought_to(entry, START + STALE + 1)
    assert (alive.waiting, alive.running) == (3, 4)
    assert (dead.waiting, dead.waiting_since, dead.running) == (0, 0.0, 0)
    assert dead.last_use == START + STALE
    assert dead.load == pytest.approx(alive.load * math.exp2(-1 / LOAD_HALF_LIFE))
    assert brought_to(entry, START + 1000).load < 0.01


def test_last_use_of_a_clock_ahead_counts_as_now():
    ahead = DemandEntry("a", "r1", START + 5, requests=4, last_use=START + 5, waiting=1)
    ahead = msgspec.structs.replace(ahead, waiting_since=START + 5)
    sum_ = total([ahead], START)["a"]
    assert sum_ == Demand(requests=4, waiting=1, waiting_since=START, last_use=START)


def test_load_is_the_mean_of_what_runs():
    ledger = DemandLedger("r1")
    for _ in range(8):
        ledger.began("a", START)
    entry = ledger.entry("a", START + LOAD_HALF_LIFE)
    assert entry is not None
    assert entry.load == pytest.approx(4.0)
    entry = ledger.entry("a", START + SUSTAINED_HALF_LIFE)
    assert entry is not None
    assert entry.sustained == pytest.approx(4.0)
    for _ in range(8):
        ledger.ended("a", START + SUSTAINED_HALF_LIFE)
    entry = ledger.entry("a", START + 2 * SUSTAINED_HALF_LIFE)
    assert entry is not None
    assert (entry.running, entry.sustained) == (0, pytest.approx(2.0))


def test_a_reader_reckons_what_the_router_would_say():
    """While nothing changes, an old entry brought to now equals a new one."""
    ledger = DemandLedger("r1")
    ledger.requested("a", START)
    for _ in range(3):
        ledger.began("a", START + 1)
    (old,) = told(ledger, START + 2)
    new = ledger.entry("a", START + 9)
    assert new is not None
    guess = brought_to(old, START + 9)
    for name in msgspec.structs.asdict(new):
        value = getattr(new, name)
        assert getattr(guess, name) == (value if isinstance(value, str) else pytest.approx(value))


def test_waiting_is_told_at_once_and_so_is_its_end():
    ledger = ledger_with(1)
    ledger.due(START)
    assert not ledger.urgent
    ledger.waits("a", START + 0.1)
    assert ledger.urgent
    (entry,) = told(ledger, START + 0.1)
    assert (entry.waiting, entry.waiting_since) == (1, START + 0.1)
    ledger.waits("a", START + 0.2)
    assert not ledger.urgent
    assert ledger.due(START + 0.2) == []
    (entry,) = told(ledger, START + 0.1 + LEAST_PAUSE)
    assert (entry.waiting, entry.waiting_since) == (2, START + 0.1)
    for _ in range(3):
        ledger.waits_no_more("a", START + 2)
    assert ledger.urgent
    (entry,) = told(ledger, START + 2)
    assert (entry.waiting, entry.waiting_since) == (0, 0.0)


def test_a_busy_model_is_told_again_and_an_unused_one_is_not():
    ledger = DemandLedger("r1")
    ledger.began("a", START)
    assert len(ledger.due(START)) == 1
    assert ledger.due(START + REFRESH - 0.1) == []
    assert len(ledger.due(START + REFRESH)) == 1
    ledger.ended("a", START + REFRESH + 1)
    (last,) = ledger.due(START + 2 * REFRESH)
    assert last.last_use == START + REFRESH + 1
    assert ledger.due(START + 4 * REFRESH) == []


def test_many_more_at_once_are_told_before_the_refresh():
    ledger = DemandLedger("r1")
    ledger.began("a", START)
    ledger.due(START)
    for _ in range(20):
        ledger.began("a", START + 0.5)
    assert ledger.due(START + 0.6) == []
    (entry,) = ledger.due(START + LEAST_PAUSE)
    assert entry.running == 21


def test_ends_without_beginnings_do_no_harm():
    ledger = DemandLedger("r1")
    ledger.ended("a", START)
    ledger.waits_no_more("a", START)
    ledger.generated("a", 5, START)
    assert ledger.entry("a", START) is None
    ledger.requested("a", START)
    ledger.ended("a", START)
    entry = ledger.entry("a", START)
    assert entry is not None
    assert entry.running == 0


def test_unused_names_are_forgotten():
    ledger = ledger_with(1)
    ledger.due(START)
    ledger.due(START + FORGET)
    assert len(ledger) == 1
    ledger.due(START + FORGET + 1)
    assert len(ledger) == 0


def test_unknown_names_are_bounded_and_the_oldest_goes():
    ledger = DemandLedger("r1", most_unknown=3)
    last = START + 9 * UNKNOWN_KEPT
    for n in range(10):
        now = START + n * UNKNOWN_KEPT
        ledger.requested("known", now)
        ledger.requested(f"made-up-{n}", now, known=False)
    assert len(ledger) == 4
    assert ledger.entry("made-up-9", last) is not None
    assert ledger.entry("made-up-6", last) is None
    assert ledger.entry("known", last) is not None


def test_names_made_up_fast_are_told_to_others_slowly():
    ledger = DemandLedger("r1")
    told = set()
    # A thousand names a second for ten minutes would be 600,000.
    for step in range(2400):
        now = START + step / 4
        for n in range(10):
            ledger.requested(f"made-up-{step}-{n}", now, known=False)
        told |= {entry.model for entry in ledger.due(now)}
    assert len(told) <= MOST_UNKNOWN * (600 / UNKNOWN_KEPT + 1)


def test_unknown_names_in_use_are_not_pushed_out():
    ledger = DemandLedger("r1", most_unknown=2)
    ledger.waits("x", START, known=False)
    ledger.waits("y", START, known=False)
    ledger.waits("z", START, known=False)
    assert ledger.entry("z", START) is None
    ledger.waits_no_more("x", START)
    later = START + UNKNOWN_KEPT
    ledger.waits("z", later, known=False)
    assert ledger.entry("z", later) is not None
    assert ledger.entry("x", later) is None


def test_a_name_that_becomes_known_makes_room():
    ledger = DemandLedger("r1", most_unknown=1)
    ledger.requested("x", START, known=False)
    ledger.requested("x", START, known=True)
    ledger.requested("y", START, known=False)
    assert len(ledger) == 2
    ledger.requested("x", START + 1, known=False)
    assert len(ledger) == 1


def test_a_clock_set_back_changes_nothing():
    ledger = ledger_with(6)
    ledger.requested("a", START - 100)
    entry = ledger.entry("a", START - 100)
    assert entry is not None
    assert (entry.requests, entry.at) == (7.0, START)


def test_most_unknown_must_be_positive():
    with pytest.raises(ValueError, match="most_unknown 0"):
        DemandLedger("r1", most_unknown=0)


@given(st.lists(st.tuples(st.floats(0, 20), st.sampled_from(["+", "-", "tell"])), max_size=60))
def test_the_ledger_agrees_with_arithmetic(steps: list[tuple[float, str]]):
    """Against sums taken from all arrivals, and an integral of what ran, from their definitions."""
    ledger = DemandLedger("r1")
    now, running = START, 0
    arrivals: list[float] = []
    stretches: list[tuple[float, float, int]] = []
    for pause, what in steps:
        stretches.append((now, now + pause, running))
        now += pause
        if what == "+":
            ledger.requested("a", now)
            ledger.began("a", now)
            arrivals.append(now)
            running += 1
        elif what == "-":
            ledger.ended("a", now)
            running = max(0, running - 1)
        else:
            ledger.due(now)
    entry = ledger.entry("a", now)
    if entry is None:
        return
    assert entry.requests == pytest.approx(
        sum(0.5 ** ((now - at) / HALF_LIFE) for at in arrivals), abs=1e-6
    )
    for half_life, mean in ((LOAD_HALF_LIFE, entry.load), (SUSTAINED_HALF_LIFE, entry.sustained)):
        expected = sum(
            count * (0.5 ** ((now - end) / half_life) - 0.5 ** ((now - begin) / half_life))
            for begin, end, count in stretches
        )
        assert mean == pytest.approx(expected, abs=1e-6)
