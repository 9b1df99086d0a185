"""Breakers: when workers are left alone, when they are tried, and that none is for ever."""

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from router.breakers import (
    FAULTS_IN_A_ROW,
    FIRST_REST,
    LONGEST_REST,
    WINDOW,
    Breaker,
    Breakers,
)


def opened() -> tuple[Breaker, float]:
    """A breaker that has just opened, and when."""
    breaker = Breaker()
    for now in range(1, FAULTS_IN_A_ROW + 1):
        breaker.failed(now - 0.5, float(now), 0.0)
    return breaker, float(FAULTS_IN_A_ROW)


def test_faults_in_a_row_open_it():
    breaker = Breaker()
    told = [breaker.failed(now - 0.5, float(now), 0.0) for now in range(1, FAULTS_IN_A_ROW + 1)]
    assert told == [False] * (FAULTS_IN_A_ROW - 1) + [True]
    assert breaker.bars(FAULTS_IN_A_ROW)
    assert breaker.state(FAULTS_IN_A_ROW) == "open"


def test_what_works_between_keeps_it_closed():
    breaker = Breaker()
    for now in range(1, 100):
        for part in range(3):
            breaker.worked(now + part / 10)
        assert not breaker.failed(now + 0.4, now + 0.5, 0.0)


def test_half_of_many_open_it_though_none_are_in_a_row():
    breaker = Breaker()
    told = []
    for now in range(1, WINDOW):
        breaker.worked(float(now))
        told.append(breaker.failed(now + 0.1, now + 0.2, 0.0))
    assert told.index(True) < WINDOW // 2


def test_all_that_one_death_takes_with_it_is_one_fault():
    breaker = Breaker()
    for late in range(200):
        assert not breaker.failed(float(late % 7), 10.0 + late / 1000, 0.0)
    assert not breaker.bars(11.0)


def test_one_try_after_the_rest_closes_it_or_doubles_the_rest():
    breaker, now = opened()
    assert not breaker.try_once() or breaker.tried() is None
    now += FIRST_REST
    assert breaker.state(now) == "half_open"
    assert not breaker.bars(now)
    assert breaker.try_once()
    assert breaker.bars(now)
    assert not breaker.try_once()
    assert breaker.failed(now, now + 0.1, 0.0)
    assert breaker.bars(now + 0.1 + FIRST_REST)
    now += 0.1 + 2 * FIRST_REST
    assert not breaker.bars(now)
    assert breaker.try_once()
    breaker.worked(now)
    assert breaker.state(now) == "closed"
    assert not breaker.failed(now + 1, now + 2, 0.0)


def test_a_try_that_tells_nothing_leaves_room_for_another():
    breaker, now = opened()
    now += FIRST_REST
    assert breaker.try_once()
    breaker.tried()
    assert not breaker.bars(now)
    assert breaker.try_once()


def test_what_was_at_work_before_says_nothing_of_what_is_new():
    breaker, now = opened()
    breaker.worked(0.1)
    assert breaker.bars(now)


def test_that_which_works_while_all_are_barred_closes_it():
    breaker, now = opened()
    breaker.worked(now + 0.1)
    assert breaker.state(now + 0.2) == "closed"


def test_rests_have_an_end_however_often_it_fails():
    breaker, now = opened()
    for _ in range(2000):
        now += LONGEST_REST
        assert not breaker.bars(now)
        assert breaker.failed(now, now + 0.001, 0.0)
        now += 0.001


@given(st.floats(0, 1))
def test_routers_do_not_try_together(draw):
    breaker = Breaker()
    for now in range(1, FAULTS_IN_A_ROW + 1):
        breaker.failed(now - 0.5, float(now), draw)
    rest = FIRST_REST * (1 - draw / 4)
    assert breaker.bars(FAULTS_IN_A_ROW + rest - 0.001)
    assert not breaker.bars(FAULTS_IN_A_ROW + rest + 0.001)


class Life(RuleBasedStateMachine):
    """Three workers under anything that can be told of them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.breakers = Breakers(lambda: self.now, lambda: 0.5)
        self.asked: list[tuple[str, float, bool]] = []

    workers = st.sampled_from(["a", "b", "c"])

    @rule(seconds=st.floats(0.001, 60))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(worker=workers)
    def ask(self, worker: str) -> None:
        barred = worker in self.breakers.barred()
        tried = self.breakers.try_once(worker)
        if tried and not barred:
            # The one try: nobody else is let through until it is over.
            assert worker in self.breakers.barred()
        self.asked.append((worker, self.now, tried))

    @precondition(lambda self: self.asked)
    @rule(data=st.data(), how=st.sampled_from(["worked", "failed", "neither"]))
    def end(self, data: st.DataObject, how: str) -> None:
        worker, asked, tried = self.asked.pop(data.draw(st.integers(0, len(self.asked) - 1)))
        self.now += 0.001
        if how == "worked":
            self.breakers.worked(worker, asked)
        elif how == "failed":
            self.breakers.failed(worker, asked)
        if tried:
            self.breakers.tried(worker)

    @rule(worker=workers)
    def heal(self, worker: str) -> None:
        """Whatever was, a worker that works again is in use again after one rest."""
        self.now += LONGEST_REST + 0.001
        self.asked = [entry for entry in self.asked if entry[0] != worker]
        self.breakers.tried(worker)
        assert worker not in self.breakers.barred()
        self.breakers.worked(worker, self.now)
        assert worker not in self.breakers.states()

    @invariant()
    def only_the_failing_are_barred(self) -> None:
        assert self.breakers.barred() <= self.breakers.states().keys()


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_nothing_is_kept_of_workers_without_faults_and_faults_are_forgotten():
    now = [0.0]
    breakers = Breakers(lambda: now[0], lambda: 0.0)
    breakers.worked("a", 0.0)
    assert not breakers.try_once("a")
    for _ in range(FAULTS_IN_A_ROW):
        now[0] += 1
        breakers.failed("a", now[0] - 0.5)
    assert breakers.states() == {"a": "open"}
    assert breakers.opened == 1
    now[0] += 1000
    breakers.failed("b", now[0])
    assert breakers.states() == {}
