"""Memory shared between models: never more than there is, never less than one needs."""

from hypothesis import given
from hypothesis import strategies as st

from worker.memory_budget import Grant, MemoryBudget, NotEnoughMemory


@given(
    total=st.integers(1, 1000),
    claims=st.lists(
        st.tuples(
            st.integers(1, 600), st.integers(0, 900), st.integers(0, 300), st.integers(0, 300)
        ),
        min_size=1,
        max_size=6,
    ),
)
def test_grants_fit_and_suffice(total: int, claims: list[tuple[int, int, int, int]]):
    budget = MemoryBudget(total, len(claims))
    granted = 0
    for least, more, draft, prefixes in claims:
        left, share = budget.left, budget.left // budget.outstanding
        try:
            grant = budget.claim(least=least, wish=least + more, draft=draft, prefixes=prefixes)
        except NotEnoughMemory:
            assert least > left
        else:
            assert least <= grant.model <= least + more
            granted += grant.model
            if grant.draft:
                assert draft > 0
                assert grant.model + draft <= share
                assert 4 * grant.model >= 3 * min(least + more, share)
                granted += draft
            assert 0 <= grant.prefixes <= prefixes
            if grant.prefixes:
                assert grant.model == least + more
                assert grant.model + draft * grant.draft + grant.prefixes <= share
            granted += grant.prefixes
    assert granted + budget.left == total


def test_what_one_does_not_need_is_for_the_next():
    budget = MemoryBudget(100, 2)
    assert budget.claim(least=10, wish=20) == Grant(20, False)
    assert budget.claim(least=10, wish=500) == Grant(80, False)


def test_a_fair_share_is_kept_for_those_to_come():
    budget = MemoryBudget(100, 2)
    assert budget.claim(least=10, wish=500) == Grant(50, False)
    assert budget.claim(least=10, wish=500) == Grant(50, False)


def test_a_model_that_fails_leaves_its_share():
    budget = MemoryBudget(100, 2)
    budget.waive()
    assert budget.claim(least=10, wish=500) == Grant(100, False)


def test_no_limit_grants_no_limit():
    assert MemoryBudget(0, 1).claim(least=10**15, wish=10**16) == Grant(0, False)
    assert MemoryBudget(0, 1).claim(least=10**15, wish=10**16, draft=10**15) == Grant(0, True)


def test_prefixes_get_what_model_and_draft_leave():
    def granted(prefixes: int, draft: int = 0) -> Grant:
        return MemoryBudget(100, 1).claim(least=10, wish=60, draft=draft, prefixes=prefixes)

    assert granted(30) == Grant(60, False, 30)
    assert granted(500) == Grant(60, False, 40)
    assert granted(500, draft=30) == Grant(60, True, 10)
    assert granted(500, draft=40) == Grant(60, True, 0)
    assert MemoryBudget(0, 1).claim(least=10, wish=60, prefixes=7) == Grant(0, False, 7)
    two = MemoryBudget(100, 2)
    assert two.claim(least=10, wish=20, prefixes=500) == Grant(20, False, 30)
    assert two.claim(least=10, wish=20, prefixes=10) == Grant(20, False, 10)
    assert two.left == 20


def test_a_draft_is_counted():
    budget = MemoryBudget(100, 1)
    assert budget.claim(least=10, wish=60, draft=30) == Grant(60, True)
    assert budget.left == 10


def test_a_draft_may_cost_its_model_a_quarter_and_no_more():
    assert MemoryBudget(100, 1).claim(least=10, wish=500, draft=25) == Grant(75, True)
    assert MemoryBudget(100, 1).claim(least=10, wish=500, draft=26) == Grant(100, False)
    assert MemoryBudget(100, 1).claim(least=80, wish=500, draft=25) == Grant(100, False)


def test_a_draft_takes_nothing_from_the_others():
    assert MemoryBudget(100, 2).claim(least=45, wish=45, draft=6) == Grant(45, False)
    assert MemoryBudget(100, 2).claim(least=45, wish=45, draft=5) == Grant(45, True)
