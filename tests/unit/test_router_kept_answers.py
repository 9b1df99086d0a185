"""What is kept for Idempotency-Keys: never more bytes than allowed, never a wrong answer."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from router.kept_answers import LARGEST_PART, OVERHEAD, KeptAnswers, KeyReused

LIMIT = 40 * OVERHEAD
A, B = b"digest a", b"digest b"


def key(number=0, owner=""):
    return owner, f"key {number}"


def keep(kept, number, size=0, now=0.0):
    kept.begin(key(number), A, number)
    assert kept.grow(key(number), size)
    kept.finish(key(number), now)


def test_an_answer_is_found_while_it_is_made_and_for_its_time():
    kept = KeptAnswers(limit=LIMIT, seconds=10.0)
    assert kept.find(key(), A, 0.0) is None
    kept.begin(key(), A, "it")
    assert kept.find(key(), A, 1e9) == "it"
    kept.finish(key(), 1e9)
    assert kept.find(key(), A, 1e9 + 9.9) == "it"
    assert kept.find(key(), A, 1e9 + 10) is None
    assert (len(kept), kept.size) == (0, 0)


@pytest.mark.parametrize("whole", [True, False])
def test_another_request_under_the_same_key_is_refused(whole):
    kept = KeptAnswers(limit=LIMIT, seconds=10.0)
    kept.begin(key(), A, "it")
    if whole:
        kept.finish(key(), 0.0)
    with pytest.raises(KeyReused, match="'key 0'"):
        kept.find(key(), B, 1.0)
    assert kept.find(key(), A, 1.0) == "it"
    assert kept.find(key(owner="other"), B, 1.0) is None


def test_what_has_failed_is_not_remembered():
    kept = KeptAnswers(limit=LIMIT, seconds=10.0)
    kept.begin(key(), A, "it")
    kept.drop(key())
    assert kept.find(key(), B, 0.0) is None
    assert kept.size == 0
    kept.drop(key())


def test_the_one_not_asked_for_longest_goes_first():
    kept = KeptAnswers(limit=LIMIT, seconds=10.0)
    for number in range(8):
        keep(kept, number, 4 * OVERHEAD)
    assert kept.size == LIMIT
    assert kept.find(key(0), A, 1.0) == 0
    keep(kept, 8, 4 * OVERHEAD)
    found = [kept.find(key(n), A, 1.0) for n in range(9)]
    assert found == [0, None, *range(2, 9)]


def test_one_answer_may_not_have_all_the_room():
    kept = KeptAnswers(limit=LIMIT, seconds=10.0)
    kept.begin(key(), A, "it")
    assert kept.grow(key(), LIMIT // LARGEST_PART - OVERHEAD)
    assert not kept.grow(key(), 1)


def test_those_being_made_are_not_put_out_for_others():
    kept = KeptAnswers(limit=LIMIT, seconds=10.0)
    for number in range(40):
        kept.begin(key(number), A, number)
    assert not kept.grow(key(0), 1)
    assert kept.find(key(39), A, 0.0) == 39


def test_a_key_that_is_used_anew_has_its_own_time():
    kept = KeptAnswers(limit=LIMIT, seconds=10.0)
    keep(kept, 0, now=0.0)
    kept.drop(key(0))
    keep(kept, 0, now=5.0)
    assert kept.find(key(0), A, 12.0) == 0


class Life(RuleBasedStateMachine):
    """Compares with a dict, from which answers may only be missing."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: KeptAnswers[int] = KeptAnswers(limit=LIMIT, seconds=100.0)
        self.now = 0.0
        self.number = 0
        self.made: dict[int, tuple[bytes, int]] = {}
        self.whole: dict[int, tuple[bytes, int, float]] = {}

    @rule(name=st.integers(0, 30), digest=st.sampled_from([A, B]))
    def ask(self, name: int, digest: bytes) -> None:
        try:
            found = self.kept.find(key(name), digest, self.now)
        except KeyReused:
            assert (self.made.get(name) or self.whole[name])[0] != digest
            return
        if name in self.made:
            assert self.made[name] == (digest, found)
        elif found is not None:
            was, number, until = self.whole[name]
            assert (was, number) == (digest, found)
            assert self.now < until
        else:
            self.number += 1
            self.kept.begin(key(name), digest, self.number)
            self.made[name] = digest, self.number
            self.whole.pop(name, None)

    @rule(data=st.data(), size=st.integers(0, 6 * OVERHEAD), good=st.booleans())
    def come_to_an_end(self, data: st.DataObject, size: int, good: bool) -> None:
        if not self.made:
            return
        name = data.draw(st.sampled_from(sorted(self.made)))
        digest, number = self.made.pop(name)
        if self.kept.grow(key(name), size) and good:
            self.kept.finish(key(name), self.now)
            self.whole[name] = digest, number, self.now + 100.0
        else:
            self.kept.drop(key(name))

    @rule(seconds=st.floats(0, 60))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def bounded(self) -> None:
        assert self.kept.size <= max(LIMIT, OVERHEAD * len(self.made))
        assert len(self.kept) <= len(self.made) + len(self.whole)
        if not len(self.kept):
            assert self.kept.size == 0


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
