"""Accounts: a loss closes them soon and for ever longer, a gain keeps them open."""

from itertools import groupby

from hypothesis import given
from hypothesis import strategies as st

from worker.engine.speculation.account import Account, Outcome


def losses(steps: int, outcome: Outcome) -> tuple[float, float, list[int]]:
    """Seconds lost, seconds in all, and the lengths of the pauses, where plain steps take 1 s."""
    account = Account()
    lost, total = 0.0, 0.0
    opened = []
    for _ in range(steps):
        opened.append(account.is_open())
        if opened[-1]:
            account.book(outcome)
            lost += outcome.spent - outcome.earned
            total += outcome.spent
        else:
            total += 1.0
    runs = [(is_open, len(list(group))) for is_open, group in groupby(opened)]
    return lost, total, [length for is_open, length in runs[:-1] if not is_open]


def test_what_loses_is_closed_for_twice_as_long_each_time():
    _, _, pauses = losses(12_000, Outcome(1.0, 1.3))

    assert pauses == [48, 96, 192, 384, 768, 1536, 3072, 3072]


@given(st.floats(0.01, 10), st.floats(1.001, 50))
def test_what_loses_is_closed_within_a_few_steps(earned, ratio):
    account = Account()
    steps = 0
    while account.is_open():
        account.book(Outcome(earned, earned * ratio))
        steps += 1

    assert 12 <= steps <= 16


def test_the_loss_stays_small_in_the_long_run():
    lost, total, _ = losses(10_000, Outcome(1.0, 1.3))

    assert 0 < lost < 0.015 * total


@given(st.lists(st.floats(1.0, 10), min_size=1, max_size=300))
def test_what_gains_is_never_closed(gains):
    account = Account()
    for gain in gains:
        assert account.is_open()
        account.book(Outcome(gain, 1.0))

    assert account.is_open()
    assert account.gain >= 1.0


@given(st.lists(st.floats(0.0, 3.0), max_size=300))
def test_it_is_never_closed_for_longer_than_the_longest_pause(gains):
    account = Account()
    for gain in gains:
        waited = 0
        while not account.is_open():
            waited += 1
        assert waited <= 3072
        account.book(Outcome(gain, 1.0))


def test_after_a_clear_gain_the_first_pause_is_short_again():
    account = Account()

    def closed_for() -> int:
        while account.is_open():
            account.book(Outcome(1.0, 1.3))
        return 1 + sum(1 for _ in iter(account.is_open, True))

    pauses = [closed_for() for _ in range(3)]
    for _ in range(20):
        account.book(Outcome(2.0, 1.0))

    assert pauses == sorted(set(pauses))
    assert closed_for() == pauses[0]


def test_the_gain_is_that_of_late():
    account = Account()
    assert account.gain == 1.0
    for _ in range(300):
        account.book(Outcome(3.0, 1.0))
    for _ in range(100):
        account.book(Outcome(1.5, 1.0))

    assert 1.5 < account.gain < 1.6
