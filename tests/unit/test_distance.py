"""Distances: they follow up and down in the stated time, and nobody is put out by one outlier."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.distance import BACK, CAP, MISSES, WEIGHT, Distances

seconds = st.floats(min_value=0.0, max_value=30.0, allow_nan=False)


def pings_until(distances, reach, sample):
    count = 0
    while distances.reach("w") != reach:
        distances.observe("w", sample)
        count += 1
    return count


def test_a_worker_is_unknown_until_its_first_ping_has_come_back():
    distances = Distances()

    assert (distances.reach("w"), distances.rtt("w")) == ("unknown", None)
    distances.miss("w", 9.0)
    assert distances.reach("w") == "unknown"
    distances.observe("w", 0.02)
    assert (distances.reach("w"), distances.rtt("w")) == ("near", 0.02)


def test_the_time_to_follow_is_as_stated():
    distances = Distances()
    distances.observe("w", 0.001)

    assert pings_until(distances, "far", 0.120) == 4
    for _ in range(50):
        distances.observe("w", 0.120)
    assert pings_until(distances, "near", 0.001) == 2


@given(seconds, seconds)
def test_the_mean_comes_to_whatever_the_round_trip_has_become(before, after):
    distances = Distances()
    distances.observe("w", before)
    for _ in range(2000):
        distances.observe("w", after)

    assert distances.rtt("w") == pytest.approx(after, abs=1e-6)
    if (
        abs(after - CAP) > 1e-3
        and abs(after - CAP * BACK) > 1e-3
        and not (CAP * BACK < after < CAP)
    ):
        assert distances.reach("w") == ("far" if after > CAP else "near")


@given(st.floats(min_value=0.0, max_value=CAP * (1 - WEIGHT) - 1e-6), seconds)
def test_one_outlier_puts_nobody_out(usual, outlier):
    distances = Distances()
    distances.observe("w", usual)
    distances.observe("w", outlier)

    assert distances.reach("w") == "near"


@given(st.lists(st.floats(min_value=CAP * BACK + 1e-6, max_value=CAP), min_size=1))
def test_between_the_two_bounds_nobody_changes_sides(samples):
    distances = Distances()
    distances.observe("near", 0.01)
    distances.observe("far", 0.3)
    before = distances.version
    for sample in samples:
        distances.observe("near", sample)
        distances.observe("far", max(sample, distances.cap * BACK + 1e-6))

    assert (distances.reach("near"), distances.reach("far")) == ("near", "far")
    assert distances.version == before


def test_missed_pings_make_a_worker_far_and_then_unknown():
    distances = Distances()
    distances.observe("w", 0.05)
    reaches = []
    for _ in range(MISSES):
        distances.miss("w", 1.0)
        reaches.append(distances.reach("w"))

    assert reaches == ["near", "far", "far", "far", "unknown"]


def test_an_answer_ends_the_count_of_misses():
    distances = Distances()
    distances.observe("w", 0.05)
    for _ in range(3 * MISSES):
        distances.miss("w", 0.01)
        distances.observe("w", 0.05)

    assert distances.reach("w") == "near"
    assert distances.rtt("w") == pytest.approx(0.05)


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["see", "miss", "forget"]), seconds))
)
def test_the_version_changes_with_every_change_of_reach(events):
    distances = Distances()
    for worker, what, sample in events:
        before = ([distances.reach(name) for name in "abc"], distances.version)
        if what == "see":
            distances.observe(worker, sample)
        elif what == "miss":
            distances.miss(worker, sample)
        else:
            distances.forget(worker)
        after = [distances.reach(name) for name in "abc"]
        assert (after != before[0]) <= (distances.version != before[1])


def test_a_cap_of_nothing_is_refused():
    with pytest.raises(ValueError, match="cap"):
        Distances(0.0)
