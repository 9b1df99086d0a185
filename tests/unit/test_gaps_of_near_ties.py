"""By how much logits must change for another token to be drawn."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from loadtests.near_ties import draw_gap
from shared.protocol import Sampling
from worker.engine.sampling import choose

ROWS = st.lists(st.floats(-3, 3, width=32), min_size=2, max_size=12)


@given(ROWS, st.floats(0.5, 2), st.floats(0.001, 0.999), st.data())
def test_the_gap_is_what_takes_the_draw_into_the_others_share(values, temperature, draw, data):
    row = np.array(values, np.float32)
    params = Sampling(seed=0, temperature=temperature)
    one = choose(row, params, draw)
    other = data.draw(st.integers(0, len(row) - 1))
    assume(other != one)
    gap = draw_gap(row, temperature, draw, one, other)

    def drawn(change: float) -> int:
        moved = row.copy()
        if other > one:
            moved[other:] += change
        else:
            moved[: other + 1] += change
        return choose(moved, params, draw)

    def beyond(token: int) -> bool:
        return token >= other if other > one else token <= other

    assert beyond(drawn(gap + 0.001))
    assert gap < 0.001 or not beyond(drawn(gap - 0.001))


def test_without_temperature_it_is_the_distance_of_the_logits():
    row = np.array([1.0, 3.5, 3.25], np.float32)
    assert draw_gap(row, 0, 0.9, 1, 2) == pytest.approx(0.25)
    assert draw_gap(row, 0, 0.9, 1, 1) == 0


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_a_forbidden_token_is_infinitely_far(temperature):
    row = np.array([1.0, -np.inf, 2.0], np.float32)
    assert draw_gap(row, temperature, 0.5, 2, 1) == math.inf
