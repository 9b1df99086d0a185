"""The length of drafts: as good as the best that a search through all of them finds."""

from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from worker.engine.speculation.control import (
    LEAST_GAIN,
    LEAST_GAIN_TOGETHER,
    LENGTHS,
    MOST_ROWS,
    MOST_SECONDS,
    MOST_SLOWER,
    Chance,
    Prospect,
    Shares,
    best_plan,
    drafting_plan,
)

chances = st.floats(0, 1)
prospects = st.lists(
    st.builds(Prospect, st.just(0.0) | st.floats(0.01, 1), st.integers(0, 80)),
    min_size=1,
    max_size=6,
)
seconds = st.floats(0.001, 0.1)


@st.composite
def costs(draw):
    """Seconds by rows: something for the call, and something for each row, dearer at a width."""
    call, row = draw(seconds), draw(st.floats(0, 0.05))
    width, bump = draw(st.integers(2, 20)), draw(st.floats(0, 0.05))
    return lambda rows: call + row * rows + (bump if rows >= width else 0.0)


def tokens_of(prospects: list[Prospect], length: int) -> float:
    return sum(1 + sum(p.chance**j for j in range(1, min(length, p.most) + 1)) for p in prospects)


# chances and shares


@given(chances, st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9))))
def test_a_chance_stays_between_0_and_1(prior, seen):
    chance = Chance(prior)
    for hits, misses in seen:
        chance.observe(hits, misses)
        chance.relax(0.5, 0.1)
        assert -1e-9 <= chance.mean <= 1 + 1e-9
        low, high = sorted((chance.mean, prior))
        assert low - 1e-9 <= chance.blended(prior, 4.0) <= high + 1e-9


@given(chances, st.integers(0, 10))
def test_a_chance_becomes_the_share_that_is_seen(prior, hits):
    chance = Chance(prior)
    for _ in range(100):
        chance.observe(hits, 10 - hits)

    # what came last counts most, by up to 0.1 at this memory
    assert chance.mean == pytest.approx(hits / 10, abs=0.01)


@given(chances, chances, st.integers(1, 200))
def test_a_chance_that_is_not_tried_goes_back(prior, usual, steps):
    chance = Chance(prior)
    for _ in range(steps):
        chance.relax(usual, 0.01)

    left = 0.99**steps
    assert chance.mean == pytest.approx(prior * left + usual * (1 - left), abs=1e-6)


weights = st.lists(st.floats(0.01, 1), min_size=8, max_size=8)


@given(weights, st.lists(st.integers(0, 7), max_size=100), weights)
def test_shares_add_up(prior, outcomes, usual):
    shares = Shares(prior)
    usual = [share / sum(usual) for share in usual]
    for outcome in outcomes:
        before = shares.shares[outcome]
        shares.observe(outcome)
        assert shares.shares[outcome] >= before
        shares.relax(usual, 0.1)

    assert sum(shares.shares) == pytest.approx(1)
    assert all(share >= 0 for share in shares.shares)


@given(weights)
def test_shares_become_what_is_seen_and_go_back_where_nothing_is(prior):
    shares = Shares(prior)
    for _ in range(200):
        for outcome in (0, 3, 3, 7):
            shares.observe(outcome)
    seen = shares.shares
    for _ in range(1000):
        shares.relax(Shares(prior).shares, 0.01)

    assert seen == pytest.approx([0.25, 0, 0, 0.5, 0, 0, 0, 0.25], abs=0.02)
    assert shares.shares == pytest.approx(Shares(prior).shares, abs=1e-3)


# drafts that cost nothing to make


@given(prospects, costs(), st.integers(1, 400))
def test_the_plan_is_the_best_of_all(prospects, target, most_rows):
    plan = best_plan(prospects, target, most_rows=most_rows)

    count = len(prospects)
    plain = count / target(count)
    hopeful = [p for p in prospects if p.most and p.chance > 0]
    longest = max((p.most for p in hopeful), default=0)
    rates = {(0, False): plain}
    bound = max(MOST_SECONDS, MOST_SLOWER * target(count))
    for length in LENGTHS:
        if length > longest or length >= MOST_ROWS:
            continue
        tokens = tokens_of(prospects, length)
        padded = target(count * (1 + length))
        if count * (1 + length) <= most_rows and padded <= bound:
            rates[length, True] = tokens / padded
        both = target(count) + target(len(hopeful) * length)
        fits = count + len(hopeful) * length <= most_rows and both <= bound
        if len(hopeful) < count and fits:
            rates[length, False] = tokens / both
    best = max(rates.values())
    if best < plain * LEAST_GAIN * (1 - 1e-9):
        assert (plan.length, plan.gain) == (0, 1.0)
    elif best > plain * LEAST_GAIN * (1 + 1e-9):
        assert plan.rate == pytest.approx(best)
        assert rates[plan.length, plan.padded] == pytest.approx(best)
        assert plan.gain == pytest.approx(best / plain)


@given(prospects, costs(), st.integers(1, 400))
def test_a_plan_gains_and_keeps_its_bounds(prospects, target, most_rows):
    plan = best_plan(prospects, target, most_rows=most_rows)

    count = len(prospects)
    assert plan.gain >= 1
    assert plan.length <= max(p.most for p in prospects)
    assert plan.length < MOST_ROWS
    if plan.length:
        hopeful = sum(1 for p in prospects if p.most and p.chance > 0)
        padded, apart = count * (1 + plan.length), count + hopeful * plan.length
        assert (padded if plan.padded else apart) <= most_rows
        if not plan.padded:
            both = target(count) + target(hopeful * plan.length)
            assert both <= target(padded) or padded > most_rows
        taken = target(padded) if plan.padded else both
        assert taken <= max(MOST_SECONDS, MOST_SLOWER * target(count))


@given(prospects, costs(), st.integers(0, 5), chances)
def test_a_higher_chance_never_makes_it_slower(prospects, target, which, more):
    index = which % len(prospects)
    prospect = prospects[index]
    assume(prospect.chance > 0)
    better = prospect._replace(chance=prospect.chance + (1 - prospect.chance) * more)
    improved = [*prospects[:index], better, *prospects[index + 1 :]]

    before = best_plan(prospects, target, most_rows=512)
    after = best_plan(improved, target, most_rows=512)
    assert after.rate >= before.rate * (1 - 1e-9)


@given(prospects, seconds)
def test_nothing_is_drafted_where_each_row_costs_as_much_as_the_first(prospects, row):
    assert best_plan(prospects, lambda rows: row * rows, most_rows=512).length == 0


@given(st.integers(1, 8), seconds, st.integers(1, 48))
def test_drafts_are_long_where_rows_are_free(count, call, most):
    plan = best_plan([Prospect(0.97, most)] * count, lambda _: call, most_rows=512)

    assert plan.length == max(length for length in LENGTHS if length <= most)
    assert plan.padded


def test_a_draft_for_one_of_two_gets_a_pass_of_its_own_where_rows_are_dear():
    pair = [Prospect(0.97, 16), Prospect(0.0, 0)]

    apart = best_plan(pair, lambda rows: 0.010 + 0.001 * rows, most_rows=512)
    padded = best_plan(pair, lambda rows: 0.010 + 0.00001 * rows, most_rows=512)
    assert (apart.length, apart.padded) == (16, False)
    assert (padded.length, padded.padded) == (16, True)


# drafts of a model


def drafted(count, shares, chances, target, draft, most, begin, overhead):
    """The rates of all cuts and lengths, by going through what may happen, token by token."""
    rates = []
    for cut in sorted(chances):
        classes = [pair for pair in zip(shares, chances, strict=True) if pair[1] >= cut]
        passing = min(1.0, sum(share for share, _ in classes))
        right = sum(share * chance for share, chance in classes)
        for length in range(1, most + 1):
            tokens = time = 0.0
            for kept in range(length + 1):
                # drafting stops at an unsure token, which is made but not verified
                made = min(length, kept + 1)
                likely = passing**kept * (1.0 if kept == length else 1 - passing)
                drafting = draft(count * begin) + (made - 1) * draft(count)
                time += likely * (drafting + target(count * (1 + kept)))
                # of those that were sure, so many are right in a row
                tokens += likely + sum(
                    right**depth * passing ** (kept - depth) * likely / passing**kept
                    for depth in range(1, kept + 1)
                    if passing
                )
            rates.append((count * tokens / (time + overhead * tokens), length))
    return rates


@given(
    st.integers(1, 4),
    st.lists(st.floats(0.01, 1), min_size=3, max_size=3),
    st.lists(chances, min_size=3, max_size=3, unique=True),
    costs(),
    costs(),
    st.integers(1, 6),
    st.integers(1, 2),
    st.floats(0, 0.05),
)
def test_the_plan_for_a_draft_model_is_the_best_of_all(
    count, weights, chances, target, draft, most, begin, overhead
):
    shares = [weight / sum(weights) for weight in weights]

    plan = drafting_plan(
        count, shares, chances, target, draft, most=most, begin=begin, overhead=overhead
    )

    plain = count / target(count)
    rates = drafted(count, shares, chances, target, draft, most, begin, overhead)
    best, _ = max(rates)
    assert plan.length <= most
    least = LEAST_GAIN if count == 1 else LEAST_GAIN_TOGETHER
    if best < plain * least * (1 - 1e-6):
        assert (plan.length, plan.gain) == (0, 1.0)
    elif best > plain * least * (1 + 1e-6):
        assert plan.rate == pytest.approx(best, rel=1e-6)
        assert plan.gain == pytest.approx(best / plain, rel=1e-6)
        assert any(rate == pytest.approx(best) and size == plan.length for rate, size in rates)


@given(
    st.integers(1, 16),
    st.lists(chances, min_size=3, max_size=3),
    st.lists(chances, min_size=3, max_size=3),
    costs(),
    costs(),
)
def test_a_better_draft_model_never_promises_less(count, one, other, target, draft):
    worse = [min(pair) for pair in zip(one, other, strict=True)]
    better = [max(pair) for pair in zip(one, other, strict=True)]
    # the same tokens, each class of which is right at least as often, and in the same order
    assume(all(a <= b for a, b in pairwise(sorted(worse))))
    shares = [0.2, 0.3, 0.5]
    order = sorted(range(3), key=lambda i: worse[i])
    assume(order == sorted(range(3), key=lambda i: better[i]))

    low = drafting_plan(count, shares, worse, target, draft, most=8)
    high = drafting_plan(count, shares, better, target, draft, most=8)
    assert high.rate >= low.rate * (1 - 1e-9)


@given(st.integers(1, 16), st.lists(chances, min_size=3, max_size=3), costs(), seconds)
def test_no_model_drafts_where_each_row_costs_as_much_as_the_first(count, chances, draft, row):
    plan = drafting_plan(count, [0.2, 0.3, 0.5], chances, lambda rows: row * rows, draft, most=8)

    assert (plan.length, plan.gain) == (0, 1.0)


@given(st.integers(1, 16), st.integers(1, 16), seconds)
def test_a_model_drafts_long_where_it_costs_nothing(count, most, call):
    plan = drafting_plan(count, [0.1, 0.9], [0.3, 0.97], lambda _: call, lambda _: 0.0, most=most)

    assert plan.length == most


@given(st.integers(1, 16), costs(), costs(), st.floats(0, 1))
def test_an_overhead_never_makes_it_faster(count, target, draft, overhead):
    def rate(extra: float) -> float:
        return drafting_plan(
            count, [0.1, 0.9], [0.3, 0.97], target, draft, most=8, overhead=extra
        ).rate

    assert rate(overhead) <= rate(0.0)
