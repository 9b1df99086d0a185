"""Memory shared between models: never more than there is, never less than one needs."""

from hypothesis import given
from hypothesis import strategies as st

from worker.memory_budget import MemoryBudget, NotEnoughMemory


@given(
    total=st.integers(1, 1000),
    claims=st.lists(st.tuples(st.integers(1, 600), st.integers(0, 900)), min_size=1, max_size=6),
)
def test_grants_fit_and_suffice(total: int, claims: list[tuple[int, int]]):
    budget = MemoryBudget(total, len(claims))
    granted = 0
    for least, more in claims:
        left = budget.left
        try:
            grant = budget.claim(least=least, wish=least + more)
        except NotEnoughMemory:
            assert least > left
        else:
            assert least <= grant <= least + more
            granted += grant
    assert granted + budget.left == total


def test_what_one_does_not_need_is_for_the_next():
    budget = MemoryBudget(100, 2)
    assert budget.claim(least=10, wish=20) == 20
    assert budget.claim(least=10, wish=500) == 80


def test_a_fair_share_is_kept_for_those_to_come():
    budget = MemoryBudget(100, 2)
    assert budget.claim(least=10, wish=500) == 50
    assert budget.claim(least=10, wish=500) == 50


def test_a_model_that_fails_leaves_its_share():
    budget = MemoryBudget(100, 2)
    budget.waive()
    assert budget.claim(least=10, wish=500) == 100


def test_no_limit_grants_no_limit():
    assert MemoryBudget(0, 1).claim(least=10**15, wish=10**16) == 0
