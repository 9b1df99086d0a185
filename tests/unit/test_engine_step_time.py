"""Times of pieces of prompts: a pass, its rows, and how deep they are."""

import math

from hypothesis import given
from hypothesis import strategies as st

from worker.engine.step_time import WINDOW, StepTime

PASS, ROW, TOKEN = 0.015, 0.0015, 3e-6


def seconds(rows: int, depth: float) -> float:
    return PASS + rows * (ROW + TOKEN * depth)


def measured() -> StepTime:
    times = StepTime()
    for step in range(WINDOW):
        rows, depth = 8 + 7 * step % 40, 37 * step % 1500
        times.add(rows, depth, seconds(rows, depth))
    return times


def test_what_steps_took_tells_what_others_will_take():
    times = measured()

    for rows, depth in ((4, 0), (48, 100), (16, 1500)):
        assert math.isclose(times.of(rows, depth), seconds(rows, depth), rel_tol=0.05)
    assert abs(times.rows(0.08, 0) - (0.08 - PASS) / ROW) <= 2
    assert times.rows(0.01, 0) == 0


def test_steps_of_one_kind_tell_what_that_kind_takes():
    times = StepTime()
    for _ in range(20):
        times.add(64, 0, 0.1)

    assert math.isclose(times.of(64, 0), 0.1, rel_tol=0.01)
    assert 25 <= times.rows(0.05, 0) <= 32


def test_what_is_long_past_is_forgotten():
    times = measured()
    for step in range(WINDOW):
        times.add(8 + step % 40, 20 * step, 2 * seconds(8 + step % 40, 20 * step))

    assert math.isclose(times.of(16, 400), 2 * seconds(16, 400), rel_tol=0.05)


def test_nothing_is_known_at_first():
    assert not StepTime()
    assert StepTime().of(8, 0) == 0


@given(
    st.lists(st.tuples(st.integers(1, 512), st.floats(0, 1e5), st.floats(1e-6, 100)), max_size=80),
    st.integers(1, 512),
    st.floats(0, 1e5),
)
def test_whatever_was_measured_times_are_numbers(steps, rows, depth):
    times = StepTime()
    for step in steps:
        times.add(*step)

    assert 0 <= times.of(rows, depth) < math.inf
    assert 0 <= times.rows(0.1, depth) <= 1e6


def test_steps_that_do_not_tell_rows_from_the_pass_do_not_make_rows_free() -> None:
    """Fewer rows took longer here, as when the machine was disturbed."""
    times = StepTime()
    for _ in range(20):
        times.add(8, 0, 0.12)
        times.add(32, 0, 0.10)

    assert times.of(1000, 0) == times.of(1, 0)
    assert 0 < times.rows(0.2, 0) <= 4 * 32 * 2
