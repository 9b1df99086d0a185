"""Silence is counted from the last token, and begins with the first."""

from hypothesis import given
from hypothesis import strategies as st

from router.silence import Silence


def test_before_the_first_token_nothing_is_counted():
    silence = Silence()
    assert silence.seconds(5.0, 0) == 0
    assert silence.seconds(500.0, 0) == 0
    assert silence.seconds(501.0, 1) == 0
    assert silence.seconds(503.5, 1) == 2.5
    assert silence.seconds(504.0, 2) == 0


def test_after_an_interruption_only_a_new_token_counts():
    silence = Silence()
    silence.seconds(1.0, 3)
    silence.interrupted(4.0, 5)
    assert silence.suspect
    assert silence.seconds(6.0, 5) == 2.0
    assert silence.suspect
    assert silence.seconds(7.0, 6) == 0
    assert not silence.suspect


@given(st.lists(st.tuples(st.floats(0.01, 5), st.integers(0, 2)), min_size=1))
def test_it_is_the_time_since_the_count_last_grew(steps):
    silence, now, seen, grew = Silence(), 0.0, 0, 0.0
    for passed, more in steps:
        now += passed
        seen += more
        if more:
            grew = now
        assert silence.seconds(now, seen) == (now - grew if seen else 0)
