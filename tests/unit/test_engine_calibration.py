"""Calibration: threads chosen, costs read between and beyond the measured, time kept. The machine
is simulated."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.engine.calibration import (
    AS_FAST,
    MOST_SECONDS,
    WIDTHS,
    Asked,
    Calibration,
    calibrate,
    fewest_threads,
    nominal,
)

seconds = st.floats(1e-6, 10)
tables = st.dictionaries(st.integers(1, 64), seconds, min_size=1)


def made(table: dict[int, float], row: float = 0.001) -> Calibration:
    return Calibration(1, 1, 1000, tuple(sorted(table.items())), row)


class Machine:
    """Its own clock: a row takes `row` seconds on one thread, the first one of a step `first`."""

    def __init__(self, first: float, row: float, *, gain: float = 0.7) -> None:
        self.now = 0.0
        self.threads = (1, 1)
        self.stepped: list[int] = []
        self.depth = 0
        self._first, self._row, self._gain = first, row, gain

    def clock(self) -> float:
        return self.now

    def set_threads(self, decode: int, prefill: int) -> None:
        self.threads = (decode, prefill)

    def cost(self, rows: int, threads: int) -> float:
        return (self._first + self._row * (rows - 1)) / threads**self._gain

    def prefill(self, rows: int) -> float:
        self.depth += rows
        return self._spend(self.cost(rows, self.threads[1]))

    def step(self, rows: int) -> float:
        self.stepped.append(rows)
        return self._spend(self.cost(rows, self.threads[0 if rows == 1 else 1]))

    def _spend(self, time: float) -> float:
        self.now += time
        return time


def measured(machine: Machine, asked: Asked, most_rows: int = 512) -> Calibration:
    return calibrate(machine, asked, poll=1000, most_rows=most_rows, clock=machine.clock)


@given(tables)
def test_what_was_measured_is_read_as_it_is(table):
    calibration = made(table)

    for rows, time in table.items():
        assert calibration.seconds(rows) == pytest.approx(time)


@given(tables, st.floats(0.5, 64))
def test_between_two_widths_the_cost_is_between_theirs(table, rows):
    calibration = made(table)
    below = [width for width in table if width <= rows] or [min(table)]
    above = [width for width in table if width >= rows] or [max(table)]
    ends = (table[max(below)], table[min(above)])

    if rows <= max(table):
        assert min(ends) - 1e-9 <= calibration.seconds(rows) <= max(ends) + 1e-9


@given(tables, st.floats(0, 1000), st.floats(0, 1000))
def test_beyond_the_widest_a_step_never_gets_cheaper(table, one, other):
    calibration = made(table)
    near, far = sorted((one, other))
    widest = max(table)

    assert table[widest] <= calibration.seconds(widest + near) <= calibration.seconds(widest + far)


def test_beyond_the_widest_the_slope_goes_on():
    assert made({1: 0.01, 24: 0.10, 48: 0.20}).seconds(96) == pytest.approx(0.40)
    assert made({1: 0.01}, row=0.002).seconds(11) == pytest.approx(0.03)


@given(st.dictionaries(st.integers(1, 64), seconds, min_size=1), st.data())
def test_the_fewest_threads_are_taken_that_are_as_fast(times, data):
    limit = data.draw(st.integers(min(times), 64))
    chosen = fewest_threads(times, limit)
    allowed = {count: time for count, time in times.items() if count <= limit}

    assert times[chosen] <= AS_FAST * min(allowed.values())
    assert all(time > AS_FAST * min(allowed.values()) for n, time in allowed.items() if n < chosen)


@pytest.mark.parametrize(
    ("cores", "candidates"), [(1, (1,)), (2, (2, 1)), (6, (6, 5, 4, 2, 1)), (8, (8, 7, 4, 2, 1))]
)
def test_threads_that_are_tried(cores, candidates):
    assert Asked(cores).candidates() == candidates
    assert Asked(cores, threads=3).candidates() == (3,)


def test_a_core_is_left_to_the_rest_even_where_it_would_help():
    calibration = measured(Machine(0.02, 0.004), Asked(cores=4))

    assert (calibration.threads, calibration.prefill_threads) == (3, 3)
    assert [threads for threads, _ in calibration.thread_seconds] == [1, 2, 3, 4]


def test_fewer_threads_do_where_more_gain_nothing():
    calibration = measured(Machine(0.02, 0.004, gain=0.01), Asked(cores=8))

    assert (calibration.threads, calibration.prefill_threads) == (1, 1)


@pytest.mark.parametrize("gain", [0.0, 1.0])
def test_threads_that_were_asked_for_are_kept(gain):
    machine = Machine(0.02, 0.004, gain=gain)
    calibration = measured(machine, Asked(cores=8, threads=5))

    assert (calibration.threads, calibration.prefill_threads) == (5, 5)
    assert machine.threads == (5, 5)
    assert calibration.seconds(4) == pytest.approx(machine.cost(4, 5))


def test_costs_are_those_of_the_threads_that_were_chosen():
    machine = Machine(0.01, 0.004)
    calibration = measured(machine, Asked(cores=2, prefill_threads=2))

    assert (calibration.threads, calibration.prefill_threads) == (1, 2)
    assert calibration.step_seconds == tuple(
        (rows, pytest.approx(machine.cost(rows, 1 if rows == 1 else 2))) for rows in sorted(WIDTHS)
    )
    assert calibration.prefill_row_seconds == pytest.approx(machine.cost(112, 2) / 112)
    assert machine.depth == 128


def test_narrow_steps_are_measured_several_times():
    machine = Machine(0.01, 0.004)
    measured(machine, Asked(cores=2))

    assert all(machine.stepped.count(rows) >= 3 for rows in (1, 2, 3, 4, 5, 6, 7, 8))


@given(st.floats(1e-4, 8.0), st.floats(0.01, 1.0), st.integers(1, 64))
def test_the_time_is_kept_however_slow_the_model_is(first, share, cores):
    machine = Machine(first, first * share)
    calibration = measured(machine, Asked(cores))

    # The first prefill, three rows alone on the slowest threads tried, and a step are what may be
    # under way when the time is over.
    begun = machine.cost(16, 1) + 3 * machine.cost(1, 1) + machine.cost(48, 1) * (first < 0.1)
    assert machine.now <= MOST_SECONDS + begun
    assert calibration.seconds(1) > 0


def test_of_a_slow_model_the_narrow_steps_are_known():
    machine = Machine(0.6, 0.2)
    calibration = measured(machine, Asked(cores=1))

    assert {1, 2, 4} <= {rows for rows, _ in calibration.step_seconds}
    assert calibration.seconds(3) == pytest.approx(machine.cost(3, 1))
    assert calibration.seconds(48) == pytest.approx(machine.cost(48, 1), rel=0.3)


@given(st.integers(1, 47))
def test_no_step_is_wider_than_allowed(most):
    machine = Machine(0.01, 0.004)
    measured(machine, Asked(cores=2), most_rows=most)

    assert max(machine.stepped) <= most


def test_progress_is_told_to_its_end():
    machine, told = Machine(0.02, 0.004), []
    calibrate(
        machine, Asked(2), poll=0, most_rows=512, clock=machine.clock, tell=lambda f: told.append(f)
    )

    assert told == sorted(told)
    assert told[-1] == 1.0
    assert all(0 <= fraction <= 1 for fraction in told)


def test_without_a_measurement_the_threads_are_the_default():
    assert nominal(Asked(cores=8), 1000).threads == 7
    assert nominal(Asked(cores=1), 1000).threads == 1
    assert nominal(Asked(cores=8, threads=2), 1000).prefill_threads == 2
    assert nominal(Asked(cores=8), 1000).seconds(1) > 0
