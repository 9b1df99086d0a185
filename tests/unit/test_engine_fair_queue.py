"""The engine's queue: nobody is starved, nothing is left lying, and owners get equal shares."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from worker.engine.fair_queue import BATCH_PATIENCE, BATCH_TURN, QUANTUM, FairQueue

Costs = st.integers(1, 2000)


def push(queue, item, owner="", *, cost=100, batch=False, now=0.0):
    queue.push(item, owner=owner, cost=cost, batch=batch, now=now)


def drain(queue, now=0.0):
    return [queue.pop(now) for _ in range(len(queue))]


def test_one_owner_is_first_come_first_served():
    queue = FairQueue()
    for number, cost in enumerate([5000, 1, 700, 64]):
        push(queue, number, cost=cost)
    assert drain(queue) == [0, 1, 2, 3]


def test_whoever_asks_for_little_is_not_behind_all_of_another():
    queue = FairQueue()
    for number in range(40):
        push(queue, ("heavy", number), "heavy")
    push(queue, ("light", 0), "light")
    assert drain(queue).index(("light", 0)) <= 2


def test_what_counts_is_tokens_not_requests():
    queue = FairQueue()
    for _ in range(40):
        push(queue, "long", "a", cost=1000)
        push(queue, "short", "b", cost=100)
    served = [queue.pop(0.0) for _ in range(22)]
    assert served.count("short") in range(18, 22)


def test_interactive_comes_first_while_batch_is_fresh():
    queue = FairQueue()
    push(queue, "batch", batch=True, now=0.0)
    for number in range(10):
        push(queue, number, now=1.0)
    assert drain(queue, now=BATCH_PATIENCE - 0.1) == [*range(10), "batch"]


def test_batch_that_has_waited_gets_every_fourth_start():
    queue = FairQueue()
    for _ in range(5):
        push(queue, "batch", batch=True, now=0.0)
    for _ in range(100):
        push(queue, "interactive", now=0.0)
    served = drain(queue, now=BATCH_PATIENCE)
    at = [index for index, kind in enumerate(served) if kind == "batch"]
    assert at == [BATCH_TURN * n - 1 for n in range(1, 6)]


def test_batch_alone_does_not_wait():
    queue = FairQueue()
    push(queue, "batch", batch=True)
    assert queue.pop(0.0) == "batch"


def test_those_that_were_next_stay_next():
    queue = FairQueue()
    for number in range(4):
        push(queue, number)
    looked_at = [queue.pop(0.0), queue.pop(0.0)]
    push(queue, "new", "other", cost=1)
    queue.push_first(looked_at)
    queue.push_first(["resumed"])
    assert [queue.pop(0.0) for _ in range(3)] == ["resumed", 0, 1]


def test_what_is_removed_is_gone_wherever_it_was():
    queue = FairQueue()
    push(queue, "a", "x")
    push(queue, "b", "x", batch=True)
    push(queue, "c", "y")
    queue.push_first(["d"])
    queue.remove(lambda item: item in "abd")
    assert drain(queue) == ["c"]
    assert len(queue) == 0


@given(
    costs=st.lists(st.tuples(Costs, Costs), min_size=60, max_size=60),
    stop=st.integers(1, 60),
    extra=st.integers(0, 3),
)
def test_shares_of_owners_that_wait_all_the_time_are_equal(costs, stop, extra):
    """By deficit round robin: to a quantum and the two largest requests."""
    queue = FairQueue()
    for left, right in costs:
        push(queue, ("left", left), "left", cost=left)
        push(queue, ("right", right), "right", cost=right)
    for number in range(extra):
        push(queue, ("other", 1), f"other {number}", cost=1)
    served = {"left": 0, "right": 0, "other": 0}
    taken = {"left": 0, "right": 0, "other": 0}
    largest = max(max(pair) for pair in costs)
    for _ in range(stop):
        owner, cost = queue.pop(0.0)
        served[owner] += cost
        taken[owner] += 1
        if max(taken.values()) == len(costs):
            break
        assert abs(served["left"] - served["right"]) <= QUANTUM + 2 * largest


@pytest.mark.parametrize("cost", [1, QUANTUM, 3 * QUANTUM, 1000])
def test_nobody_is_starved_by_ever_new_owners(cost):
    """One who calls himself another each time, in a queue that is always full."""
    limit = 64
    queue = FairQueue()
    for number in range(limit - 1):
        push(queue, "flood", f"flood {number}", cost=QUANTUM)
    push(queue, "patient", "patient", cost=cost)
    rounds = -(-cost // QUANTUM)
    for number in range((rounds + 1) * limit):
        if queue.pop(0.0) == "patient":
            return
        push(queue, "flood", f"more {number}", cost=QUANTUM)
    pytest.fail("it was starved")


@given(seed=st.integers(0, 10_000), owners=st.integers(1, 5))
def test_batch_is_not_starved_by_endless_interactive(seed, owners):
    draw = random.Random(seed)
    queue = FairQueue()
    for number in range(8):
        push(queue, ("batch", number), f"o{number % owners}", cost=64, batch=True)
    for number in range(56):
        push(queue, ("interactive", 0), f"o{number % owners}", cost=draw.randint(1, 500))
    starts = 0
    left = 8
    now = BATCH_PATIENCE
    while left:
        kind, _ = queue.pop(now)
        starts += 1
        left -= kind == "batch"
        assert starts <= BATCH_TURN * 8
        push(queue, ("interactive", 0), f"o{draw.randrange(owners)}", now=now)


class Bag(RuleBasedStateMachine):
    """Whatever is done, what went in comes out once, and something comes if anything is there."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: FairQueue[int] = FairQueue()
        self.inside: set[int] = set()
        self.number = 0
        self.now = 0.0

    @rule(owner=st.sampled_from("abc"), cost=Costs, batch=st.booleans())
    def push(self, owner: str, cost: int, batch: bool) -> None:
        self.number += 1
        self.queue.push(self.number, owner=owner, cost=cost, batch=batch, now=self.now)
        self.inside.add(self.number)

    @precondition(lambda self: self.inside)
    @rule(back=st.booleans())
    def pop(self, back: bool) -> None:
        item = self.queue.pop(self.now)
        assert item in self.inside
        if back:
            self.queue.push_first([item])
            assert self.queue.pop(self.now) == item
        self.inside.remove(item)

    @rule(part=st.integers(1, 4))
    def remove(self, part: int) -> None:
        self.queue.remove(lambda item: item % part == 0)
        self.inside = {item for item in self.inside if item % part}

    @rule(seconds=st.floats(0, 40))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def counts(self) -> None:
        assert len(self.queue) == len(self.inside)
        assert bool(self.queue) == bool(self.inside)


TestBag = Bag.TestCase
TestBag.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
