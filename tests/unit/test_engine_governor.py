"""Threads by measurement: the best number is found, looking costs little, a neighbour's coming and
going is noticed. Time is simulated."""

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.engine.governor import ALLOWANCE, Governor, rungs

Machine = Callable[[int, int], float]
"""Seconds of a step by threads and rows."""


def run(governor: Governor, machine: Machine, steps: int, rows: int = 1) -> float:
    """Seconds that so many steps take."""
    total = 0.0
    for _ in range(steps):
        seconds = machine(governor.threads, rows)
        governor.measured(rows, seconds)
        total += seconds
    return total


def alone(threads: int, rows: int) -> float:
    return 0.010 * rows / threads**0.7


def neighbour(threads: int, rows: int) -> float:
    """Two threads on two cores beside a busy process, as measured: a single one is not hindered."""
    return alone(1, rows) * (1.0 if threads == 1 else 3.0)


def test_rungs_are_all_threads_and_powers_of_two():
    assert rungs(1) == (1,)
    assert rungs(2) == (2, 1)
    assert rungs(6) == (6, 4, 2, 1)
    assert rungs(8) == (8, 4, 2, 1)


def test_no_thread_at_all_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        Governor(0)


@given(st.lists(st.tuples(st.integers(1, 64), st.floats(0, 10)), max_size=300), st.integers(1, 64))
def test_whatever_is_measured_the_threads_are_of_the_rungs(measured, most):
    governor = Governor(most, expected=lambda rows: 0.01 * rows)
    for rows, seconds in measured:
        governor.measured(rows, seconds)

        assert governor.threads in rungs(most)
        assert governor.settled in rungs(most)


@settings(max_examples=60)
@given(
    st.integers(2, 32),
    st.dictionaries(
        st.sampled_from((1, 2, 4, 8, 16, 32)), st.floats(1.2, 30.0), min_size=6, max_size=6
    ),
)
def test_where_all_threads_are_best_looking_costs_less_than_a_hundredth(most, factors):
    governor = Governor(most)

    def machine(threads: int, rows: int) -> float:
        return 0.01 if threads == most else 0.01 * factors[threads]

    total = run(governor, machine, 5000)

    dearest = 0.01 * max(factors.values())
    assert governor.settled == most
    assert total <= 5000 * 0.01 * (1 + ALLOWANCE) + dearest


def test_beside_a_busy_neighbour_one_thread_is_found_and_two_again_when_it_is_gone():
    governor = Governor(2)
    run(governor, alone, 500)
    assert governor.settled == 2

    run(governor, neighbour, 150)
    assert governor.settled == 1

    run(governor, alone, 600)
    assert governor.settled == 2


def test_beside_a_neighbour_that_stays_the_cost_is_that_of_one_thread():
    governor = Governor(2)
    run(governor, neighbour, 150)

    total = run(governor, neighbour, 3000)

    assert total <= 3000 * neighbour(1, 1) * 1.02


def test_the_best_of_many_rungs_is_climbed_down_to():
    governor = Governor(16)

    def machine(threads: int, rows: int) -> float:
        return {16: 0.05, 8: 0.03, 4: 0.01, 2: 0.013, 1: 0.02}[threads]

    run(governor, machine, 2000)

    assert governor.settled == 4


def test_equally_fast_numbers_do_not_make_it_waver():
    governor = Governor(2)
    rng = random.Random(5)
    seen = set()
    for _ in range(5000):
        governor.measured(1, 0.01 * rng.uniform(0.98, 1.02))
        seen.add(governor.settled)

    assert seen == {2}


def test_a_machine_that_stops_for_a_moment_is_no_reason():
    governor = Governor(2)
    rng = random.Random(3)
    seen = set()
    for step in range(5000):
        hiccup = 0.2 if step % 40 == 7 else 0.0
        governor.measured(1, alone(governor.threads, 1) * rng.uniform(0.95, 1.05) + hiccup)
        seen.add(governor.settled)

    assert seen == {2}


@settings(max_examples=30)
@given(st.randoms(use_true_random=False))
def test_steps_of_unequal_width_are_compared_by_what_they_were_expected_to_take(rng):
    governor = Governor(2, expected=lambda rows: 0.004 + 0.003 * rows)
    for _ in range(2000):
        rows = rng.randint(1, 32)
        seconds = (0.004 + 0.003 * rows) * (1.0 if governor.threads == 2 else 1.7)
        governor.measured(rows, seconds)

        assert governor.settled == 2
