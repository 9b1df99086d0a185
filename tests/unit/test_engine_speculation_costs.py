"""The cost of a step by rows: read between its points, followed as the machine changes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.engine.speculation.costs import NOMINAL, StepCost

times = st.floats(1e-6, 10)
tables = st.dictionaries(st.integers(1, 200), times, min_size=1, max_size=12)


@st.composite
def rising_tables(draw):
    table = draw(tables)
    return dict(zip(sorted(table), sorted(table.values()), strict=True))


@given(tables)
def test_at_its_points_it_is_what_was_measured(table):
    cost = StepCost(table.items())

    last = max(table)
    for rows in table.keys() - {last}:
        assert cost.seconds(rows) == pytest.approx(table[rows], rel=1e-6)
    # the line that goes on beyond the last one does not fall towards it either
    floor = max((rows for rows in table if rows < last), default=last)
    assert cost.seconds(last) == pytest.approx(max(table[last], table[floor]), rel=1e-6)


@given(tables, st.integers(1, 300))
def test_between_two_points_it_is_between_them(table, rows):
    below = [width for width in table if width <= rows] or [min(table)]
    above = [width for width in table if width >= rows] or [max(table)]
    ends = sorted((table[max(below)], table[min(above)]))

    if rows < max(table):
        seconds = StepCost(table.items()).seconds(rows)
        assert ends[0] * (1 - 1e-6) <= seconds <= ends[1] * (1 + 1e-6)


@given(rising_tables(), st.integers(1, 1000), st.integers(1, 1000))
def test_more_rows_never_take_less_where_the_points_rise(table, one, other):
    cost = StepCost(table.items())
    few, many = sorted((one, other))

    assert cost.seconds(few) <= cost.seconds(many) * (1 + 1e-6)


@given(tables, st.integers(1, 1000))
def test_beyond_the_last_point_it_never_falls(table, more):
    last = max(table)

    beyond = StepCost(table.items()).seconds(last + more)
    assert beyond >= table[last] * (1 - 1e-6)


@pytest.mark.parametrize("rows", [1, 2, 5, 8, 20, 32, 40])
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_it_follows_a_machine_that_becomes_twice_as_slow_or_fast(rows, factor):
    cost, before = StepCost(), StepCost()

    for _ in range(60):
        cost.measured(rows, before.seconds(rows) * factor)

    assert cost.seconds(rows) == pytest.approx(before.seconds(rows) * factor, rel=0.05)
    # the speed is that of all widths, though some of it may be this width's own
    for width in (1, 2, 5, 8, 20, 32, 40):
        ratio = cost.seconds(width) / before.seconds(width)
        assert ratio == pytest.approx(factor, rel=0.35)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_model_drifts_with_the_one_beside_it_and_learns_how_it_differs(factor):
    other, before = StepCost(), StepCost()
    cost = StepCost([(1, 0.002), (32, 0.02)], beside=other)
    for _ in range(60):
        other.measured(8, before.seconds(8) * factor)

    drifted = other.seconds(8) / before.seconds(8)
    assert drifted == pytest.approx(factor, rel=0.05)
    assert cost.seconds(1) / 0.002 == pytest.approx(cost.seconds(32) / 0.02)
    assert cost.seconds(1) / 0.002 == pytest.approx(factor, rel=0.35)

    slower = 1.5 * cost.seconds(1)
    for _ in range(200):
        cost.measured(1, slower)
    assert cost.seconds(1) == pytest.approx(slower, rel=0.05)
    assert other.seconds(8) / before.seconds(8) == drifted


def test_it_follows_a_machine_that_becomes_much_slower_though_one_such_step_is_an_outlier():
    cost = StepCost()
    for _ in range(400):
        cost.measured(8, 10 * dict(NOMINAL)[8])

    assert cost.seconds(8) == pytest.approx(10 * dict(NOMINAL)[8], rel=0.05)


@given(st.integers(1, 64), st.floats(3.1, 1e4) | st.floats(1e-4, 0.3))
def test_one_step_that_was_disturbed_moves_it_little(rows, factor):
    cost, before = StepCost(), StepCost()

    cost.measured(rows, before.seconds(rows) * factor)

    for width in (1, 2, 8, 32, rows):
        assert cost.seconds(width) == pytest.approx(before.seconds(width), rel=0.03)


@given(st.lists(st.tuples(st.integers(1, 64), st.floats(0.5, 2)), max_size=200))
def test_whatever_is_measured_it_stays_positive(measurements):
    truth = StepCost()
    cost = StepCost()
    for rows, factor in measurements:
        cost.measured(rows, truth.seconds(rows) * factor)

    for rows in (1, 2, 8, 32, 64):
        assert 0.2 <= cost.seconds(rows) / truth.seconds(rows) <= 5


def test_a_wrong_shape_is_corrected_at_the_width_that_is_measured():
    truth = dict(NOMINAL)
    cost = StepCost([*NOMINAL[:2], (8, 2 * truth[8]), NOMINAL[3]])

    for _ in range(200):
        for rows in (1, 2, 8, 32):
            cost.measured(rows, truth[rows])

    for rows, seconds in truth.items():
        assert cost.seconds(rows) == pytest.approx(seconds, rel=0.05)


@pytest.mark.parametrize("points", [[], [(1, 0.0)], [(1, -0.1)]])
def test_points_that_are_no_costs_are_refused(points):
    with pytest.raises(ValueError, match=r".+"):
        StepCost(points)


@pytest.mark.parametrize("seconds", [0.0, -0.1])
def test_a_time_that_is_none_is_refused(seconds):
    cost = StepCost()

    with pytest.raises(ValueError, match=r".+"):
        cost.measured(1, seconds)
    assert cost.seconds(1) == pytest.approx(0.010)


@given(rising_tables(), times, st.integers(1, 40), st.integers(1, 512))
def test_the_most_rows_within_a_time_are_the_most_and_whole_times_the_least(
    table, seconds, rows, most
):
    cost = StepCost(table.items())

    found = cost.rows_within(seconds, rows, most)

    assert found % rows == 0
    assert found == rows or (found <= most and cost.seconds(found) <= seconds)
    assert found + rows > most or cost.seconds(found + rows) > seconds


@given(rising_tables(), st.floats(0, 1), st.integers(1, 200))
def test_the_way_round_is_added_and_is_not_taken_for_the_machines_speed(table, way, rows):
    near, far = StepCost(table.items()), StepCost(table.items(), latency=lambda: way)

    assert far.seconds(rows) == pytest.approx(way + near.seconds(rows))
    for _ in range(50):
        near.measured(rows, near.seconds(rows))
        far.measured(rows, far.seconds(rows))
    assert far.seconds(rows) == pytest.approx(way + near.seconds(rows), rel=1e-3)


def test_a_way_that_is_longer_than_what_a_step_took_does_no_harm():
    cost = StepCost({1: 0.01, 8: 0.02}.items(), latency=lambda: 0.05)
    for _ in range(100):
        cost.measured(1, 0.001)
    assert 0.05 < cost.seconds(8) < 0.08
