"""Lanes: all get a part, steps come back in the order in which they set off, none is lost."""

from collections import deque
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from worker.engine.lanes import deal, overlap


@given(st.lists(st.integers(), min_size=1, max_size=40), st.integers(1, 6))
def test_lanes_hold_all_in_their_order_and_are_alike(items: list[int], lanes: int) -> None:
    dealt = deal(items, lanes)
    assert [item for lane in dealt for item in lane] == items
    sizes = [len(lane) for lane in dealt]
    assert len(sizes) == min(lanes, len(items))
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 5), st.integers(1, 30))
def test_each_lane_goes_on_until_one_step_says_that_it_is_over(lanes: int, last: int) -> None:
    under_way: deque[int] = deque()
    begun: list[int] = []
    finished: list[int] = []

    def begin(lane: Sequence[int]) -> int:
        # Of each lane at most one step is under way.
        assert lane[0] not in under_way
        under_way.append(lane[0])
        begun.append(lane[0])
        return lane[0]

    def finish(lane: int) -> bool:
        assert under_way.popleft() == lane
        finished.append(lane)
        return len(finished) < last

    steps = overlap([[lane] for lane in range(lanes)], begin, finish)
    assert not under_way
    assert finished == begun
    assert steps == len(finished) == max(last, 1) + lanes - 1
    assert finished == [step % lanes for step in range(steps)]
