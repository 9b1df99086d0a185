"""The budget: retries stay a share of the requests, whatever comes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.retrying import FLOOR, LONGEST_PAUSE, SAVED, RetryBudget, pause

Events = st.lists(
    st.one_of(
        st.just("request"), st.just("retry"), st.floats(0.0, 100.0, allow_nan=False).map(float)
    ),
    max_size=200,
)


@given(st.sampled_from([0.0, 0.1, 0.2, 1.0]), Events)
def test_never_more_than_share_floor_and_what_was_saved(share, events):
    budget = RetryBudget(share, 0.0)
    now, requests, made = 0.0, 0, 0
    for event in events:
        if event == "request":
            budget.requested()
            requests += 1
        elif event == "retry":
            made += budget.take(now)
        else:
            now += event
        assert made <= SAVED + share * requests + FLOOR * now + 1e-6
    assert budget.made == made
    assert budget.made + budget.refused == events.count("retry")


def test_an_outage_is_not_multiplied():
    """Each request fails three times over: in the long run it is not asked four times."""
    budget = RetryBudget(0.2, 0.0)
    asked = 0
    for second in range(60):
        for _ in range(500):
            budget.requested()
            asked += 1 + sum(budget.take(float(second)) for _ in range(3))
    assert asked / (60 * 500) < 1.2 + (FLOOR * 60 + SAVED) / (60 * 500) + 0.01


def test_after_quiet_it_is_whole_again():
    budget = RetryBudget(0.0, 0.0)
    assert sum(budget.take(0.0) for _ in range(1000)) == SAVED
    assert not budget.take(0.05)
    assert budget.take(0.1)
    assert sum(budget.take(1e6) for _ in range(1000)) == SAVED


def test_a_clock_that_stands_or_runs_back_brings_nothing():
    budget = RetryBudget(0.0, 10.0)
    assert sum(budget.take(10.0) for _ in range(1000)) == SAVED
    assert not budget.take(5.0)
    assert not budget.take(10.0)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_an_impossible_share_is_refused(share):
    with pytest.raises(ValueError, match="from 0 to 1"):
        RetryBudget(share, 0.0)


@given(st.integers(1, 5000), st.floats(0, 1))
def test_pauses_are_bounded_and_grow(losses, draw):
    assert 0 <= pause(losses, draw) <= LONGEST_PAUSE
    assert pause(losses, draw) <= pause(losses + 1, draw)


def test_pauses_are_spread():
    assert pause(2, 0.0) == 0.0
    assert pause(1, 1.0) == 0.05
    assert pause(2, 1.0) == 0.1
    assert pause(20, 0.5) == 0.5
