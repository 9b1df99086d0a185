"""The account of slots: exact whatever comes, in whatever order."""

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from worker.admission import (
    LATELY,
    SPENT_LIMIT,
    SPENT_SECONDS,
    Admission,
    Admitted,
    Dropped,
    Refused,
    Ticket,
)


def ticket(attempt: int, weight: int = 1, owner: str = "", *, batch: bool = False) -> Ticket:
    return Ticket(attempt, "reply", weight, owner, "batch" if batch else "interactive")


def admitted(admission: Admission, count: int, owner: str = "", *, batch: bool = False) -> int:
    """How many of so many new requests come in."""
    first = 1000 * (1 + len(admission))
    tickets = [ticket(first + n, owner=owner, batch=batch) for n in range(count)]
    return sum(isinstance(admission.offer(one, 1.0), Admitted) for one in tickets)


def test_slots_then_queue_then_refusal():
    admission = Admission(slots=2, queue_limit=1)
    assert [admission.offer(ticket(n), 0.0) for n in range(3)] == [
        Admitted(0),
        Admitted(0),
        Admitted(1),
    ]
    assert isinstance(admission.offer(ticket(3), 0.0), Refused)
    assert (admission.free, admission.queued, len(admission)) == (0, 1, 3)


def test_who_of_those_that_wait_runs_is_what_the_engine_says():
    admission = Admission(1, 2)
    for n in range(3):
        admission.offer(ticket(n), 0.0)
    admission.started((0,), 0.0)
    admission.release(0, 1.0)
    assert (admission.free, admission.queued) == (0, 2)
    admission.started((2,), 1.0)
    assert (admission.free, admission.queued) == (0, 1)
    admission.release(1, 1.0)
    assert (admission.free, admission.queued) == (0, 0)
    admission.started((1,), 1.0)
    admission.release(2, 1.0)
    assert admission.free == 1


def test_one_owner_alone_may_have_the_whole_queue():
    admission = Admission(1, 64)
    assert admitted(admission, 100, "a") == 65
    batch = Admission(1, 64)
    assert admitted(batch, 100, "a", batch=True) == 65


def test_an_owner_leaves_places_for_others():
    admission = Admission(1, 64)
    admission.offer(ticket(1, owner="b"), 0.0)
    admission.offer(ticket(2, owner="a"), 0.0)
    admission.release(2, 0.0)
    assert admitted(admission, 100, "a") == 48
    assert admitted(admission, 100, "b") == 12
    assert admitted(admission, 100, "c") == 3


def test_an_owner_that_comes_when_all_is_taken_finds_room_later():
    admission = Admission(1, 8)
    assert admitted(admission, 10, "heavy") == 9
    assert admitted(admission, 1, "light") == 0
    waiting = [one.attempt for one in admission.tickets][1:]
    admission.release(waiting[0], 1.0)
    assert admitted(admission, 10, "heavy") == 0
    assert admitted(admission, 1, "light") == 1


def test_batch_leaves_places_for_those_that_are_interactive():
    admission = Admission(1, 64)
    admission.offer(ticket(1), 0.0)
    assert admitted(admission, 100, batch=True) == 32
    assert admitted(admission, 100) == 32


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_in_a_short_queue_there_is_a_place_for_anybody(limit: int):
    admission = Admission(1, limit)
    admission.offer(ticket(1, owner="b"), 0.0)
    admission.offer(ticket(2, owner="a"), 0.0)
    admission.release(2, 0.0)
    assert admitted(admission, 1, "a", batch=True) == 1


def test_nothing_is_kept_free_for_those_who_came_long_ago():
    admission = Admission(1, 8)
    admission.offer(ticket(1, owner="b"), -LATELY)
    admission.offer(ticket(2, owner="a", batch=True), -LATELY)
    admission.release(2, -LATELY)
    assert admitted(admission, 10, "a", batch=True) == 8


def test_nobody_overtakes_a_wide_request_that_waits():
    admission = Admission(4, 8)
    admission.offer(ticket(1, 2), 0.0)
    assert admission.offer(ticket(2, 4), 0.0) == Admitted(1)
    assert admission.free == 0
    assert admission.offer(ticket(3, 1), 0.0) == Admitted(2)


def test_a_request_wider_than_the_model_takes_all_of_it():
    admission = Admission(2, 8)
    assert admission.offer(ticket(1, 8), 0.0) == Admitted(0)
    assert admission.free == 0
    admission.release(1, 0.0)
    assert admission.free == 2


def test_doubled_cancelled_and_late_attempts_are_dropped():
    admission = Admission(2, 0)
    admission.offer(ticket(1), 0.0)
    assert admission.offer(ticket(1), 0.0) == Dropped("duplicate")
    assert admission.cancel(2, 0.0) is None
    assert admission.offer(ticket(2), 1.0) == Dropped("spent")
    admission.release(1, 1.0)
    assert admission.offer(ticket(1), 2.0) == Dropped("spent")


def test_what_was_is_forgotten_in_time_and_in_number():
    admission = Admission(1, 0)
    admission.cancel(1, 0.0)
    assert admission.offer(ticket(1), SPENT_SECONDS) == Admitted(0)
    admission.cancel(2, 0.0)
    for n in range(SPENT_LIMIT):
        admission.cancel(100 + n, 0.0)
    admission.release(1, 1.0)
    assert admission.offer(ticket(2), 1.0) == Admitted(0)


def test_a_cancelled_attempt_keeps_its_slot_until_the_engine_lets_go():
    admission = Admission(1, 0)
    admission.offer(ticket(1), 0.0)
    assert admission.cancel(1, 0.0) == ticket(1)
    assert admission.free == 0
    admission.release(1, 0.0)
    assert admission.free == 1


def test_draining_refuses_but_remembers_nothing():
    admission = Admission(1, 1)
    admission.draining = True
    verdict = admission.offer(ticket(1), 0.0)
    assert isinstance(verdict, Refused)
    assert verdict.reason == "draining"
    admission.draining = False
    assert admission.offer(ticket(1), 0.0) == Admitted(0)


def test_the_guess_of_a_wait_follows_what_requests_took():
    def guess(seconds: float) -> float:
        admission = Admission(1, 0)
        for n in range(50):
            admission.offer(ticket(n), 0.0)
            admission.release(n, seconds)
        admission.offer(ticket(99), 0.0)
        refused = admission.offer(ticket(100), 0.0)
        assert isinstance(refused, Refused)
        return refused.retry_after

    assert 0.1 <= guess(0.0) < guess(5.0) < guess(20.0) <= guess(1e6) == 60.0


def hurried(
    attempt: int, seconds: float, tokens: int = 0, *, owner: str = "", batch: bool = False
) -> Ticket:
    plain = ticket(attempt, owner=owner, batch=batch)
    return msgspec.structs.replace(plain, tokens=tokens, deadline=100.0 + seconds)


@pytest.fixture
def ten_seconds_each() -> Admission:
    """One slot, taken at 100.0; those before took 10 s each and could have had 100 tokens."""
    admission = Admission(1, 64)
    for n in range(100):
        admission.offer(msgspec.structs.replace(ticket(n), tokens=100), 0.0)
        admission.release(n, 10.0)
    admission.offer(ticket(1000), 100.0)
    return admission


def test_who_cannot_be_answered_in_time_is_refused_at_once(ten_seconds_each: Admission):
    """10 s for the answer, and of what is left a third may be waited for."""
    late = ten_seconds_each.offer(hurried(1, 39.0), 100.0)
    assert isinstance(late, Refused)
    assert (late.reason, round(late.retry_after)) == ("late", 10)
    assert ten_seconds_each.offer(hurried(2, 41.0), 100.0) == Admitted(1)
    assert isinstance(ten_seconds_each.offer(hurried(3, 69.0), 100.0), Refused)
    assert ten_seconds_each.offer(hurried(4, 71.0), 100.0) == Admitted(2)


def test_who_wants_little_needs_little_time(ten_seconds_each: Admission):
    assert isinstance(ten_seconds_each.offer(hurried(1, 31.0, tokens=50), 100.0), Refused)
    assert ten_seconds_each.offer(hurried(2, 31.0, tokens=5), 100.0) == Admitted(1)


def test_whose_turn_is_soon_is_not_late_for_those_that_come_after(ten_seconds_each: Admission):
    for n in range(5):
        ten_seconds_each.offer(ticket(n + 1, owner="many"), 100.0)
    assert isinstance(ten_seconds_each.offer(hurried(11, 71.0, owner="many"), 100.0), Refused)
    assert ten_seconds_each.offer(hurried(12, 71.0, owner="one"), 100.0) == Admitted(6)


def test_batch_requests_make_nobody_late_but_their_own_kind(ten_seconds_each: Admission):
    for n in range(5):
        ten_seconds_each.offer(ticket(n + 1, batch=True), 100.0)
    assert isinstance(ten_seconds_each.offer(hurried(11, 41.0, batch=True), 100.0), Refused)
    assert ten_seconds_each.offer(hurried(12, 41.0), 100.0) == Admitted(6)


def test_where_a_slot_is_free_nobody_is_late(ten_seconds_each: Admission):
    ten_seconds_each.release(1000, 100.0)
    assert ten_seconds_each.offer(hurried(1, 0.1), 100.0) == Admitted(0)


def test_the_time_in_the_queue_is_not_counted_as_time_in_a_slot():
    admission = Admission(1, 1)
    admission.offer(ticket(1), 0.0)
    for n in range(2, 60):
        admission.offer(ticket(n), 2.0 * n)
        admission.release(n - 1, 100.0 + 2 * n)
        admission.started((n,), 100.0 + 2 * n)
    admission.offer(ticket(98), 220.0)
    refused = admission.offer(ticket(99), 220.0)
    assert isinstance(refused, Refused)
    assert refused.retry_after < 10


def test_what_runs_for_long_is_expected_to_go_on():
    admission = Admission(2, 0)
    admission.offer(ticket(1), 0.0)
    admission.offer(ticket(2), 0.0)
    refused = admission.offer(ticket(3), 30.0)
    assert isinstance(refused, Refused)
    assert refused.retry_after == 15.0


@pytest.mark.parametrize(("slots", "queue"), [(0, 1), (1, -1)])
def test_impossible_sizes_are_refused(slots: int, queue: int):
    with pytest.raises(ValueError, match="at least"):
        Admission(slots, queue)


def test_the_size_changes_only_while_nothing_is_in():
    admission = Admission(4, 1)
    admission.resize(2)
    assert admission.free == 2
    admission.offer(ticket(1), 0.0)
    with pytest.raises(ValueError, match="resize"):
        admission.resize(4)


class Account(RuleBasedStateMachine):
    """Compares with a model that keeps nothing but lists."""

    @initialize(slots=st.integers(1, 6), queue=st.integers(0, 5))
    def set_up(self, slots: int, queue: int) -> None:
        self.admission = Admission(slots, queue)
        self.slots, self.queue = slots, queue
        self.running: list[tuple[int, int]] = []
        self.waiting: list[tuple[int, int]] = []
        self.spent: set[int] = set()

    def used(self) -> int:
        return sum(weight for _, weight in self.running)

    @rule(attempt=st.integers(0, 12), weight=st.integers(1, 8))
    def offer(self, attempt: int, weight: int) -> None:
        known = [a for a, _ in self.running + self.waiting]
        clamped = min(weight, self.slots)
        verdict = self.admission.offer(ticket(attempt, weight), 0.0)
        if attempt in known or attempt in self.spent:
            assert isinstance(verdict, Dropped)
        elif not self.waiting and self.used() + clamped <= self.slots:
            assert verdict == Admitted(0)
            self.running.append((attempt, clamped))
        elif len(self.waiting) < self.queue:
            self.waiting.append((attempt, clamped))
            assert verdict == Admitted(len(self.waiting))
        else:
            assert isinstance(verdict, Refused)

    @rule(attempt=st.integers(0, 12))
    def release(self, attempt: int) -> None:
        known = [a for a, _ in self.running + self.waiting]
        released = self.admission.release(attempt, 0.0)
        assert (released is not None) == (attempt in known)
        if attempt in known:
            self.running = [entry for entry in self.running if entry[0] != attempt]
            self.waiting = [entry for entry in self.waiting if entry[0] != attempt]
            self.spent.add(attempt)

    @rule(attempts=st.lists(st.integers(0, 12), max_size=4))
    def started(self, attempts: list[int]) -> None:
        self.admission.started(attempts, 0.0)
        for attempt in attempts:
            entry = next((e for e in self.waiting if e[0] == attempt), None)
            if entry is not None:
                self.waiting.remove(entry)
                self.running.append(entry)

    @rule(attempt=st.integers(0, 12))
    def cancel(self, attempt: int) -> None:
        known = [a for a, _ in self.running + self.waiting]
        assert (self.admission.cancel(attempt, 0.0) is not None) == (attempt in known)
        if attempt not in known:
            self.spent.add(attempt)

    @rule()
    def engine_dies(self) -> None:
        lost = {entry.attempt for entry in self.admission.clear(0.0)}
        assert lost == {a for a, _ in self.running + self.waiting}
        self.spent |= lost
        self.running, self.waiting = [], []
        self.admission.resize(self.slots)

    @rule()
    def time_passes(self) -> None:
        # Everything spent so far was spent at 0; one offer later than that forgets it all.
        self.admission.cancel(10**6, -SPENT_SECONDS)
        self.admission.offer(ticket(10**6), SPENT_SECONDS)
        self.admission.release(10**6, 0.0)
        self.spent = set()

    @invariant()
    def account_is_exact(self) -> None:
        if not hasattr(self, "admission"):
            return
        assert 0 <= self.admission.free <= self.slots
        free = max(0, self.slots - self.used())
        assert self.admission.free == (0 if self.waiting else free)
        assert self.admission.queued == len(self.waiting) <= self.queue
        assert len(self.admission) == len(self.running) + len(self.waiting)
        for attempt, _ in self.running + self.waiting:
            assert attempt in self.admission


TestAccount = Account.TestCase
TestAccount.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
