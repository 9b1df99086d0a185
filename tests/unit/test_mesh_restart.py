from hypothesis import given
from hypothesis import strategies as st

from mesh.restart import Restarts


@given(st.lists(st.floats(min_value=0, max_value=19), max_size=2000))
def test_delays_of_the_dying_double_up_to_the_most(lives: list[float]) -> None:
    restarts = Restarts()
    delays = [restarts.after(lived) for lived in lives]
    for index, delay in enumerate(delays):
        assert delay == min(restarts.most, restarts.first * 2 ** min(index, 100))


@given(st.integers(min_value=0, max_value=50), st.floats(min_value=20, max_value=1e9))
def test_a_long_life_makes_good(deaths: int, lived: float) -> None:
    restarts = Restarts()
    for _ in range(deaths):
        restarts.after(0.0)
    assert restarts.after(lived) == restarts.first
    assert restarts.after(0.0) == restarts.first * 2
