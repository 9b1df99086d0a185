"""A draft model that takes over what the target has computed, and when it reads instead."""

import time as clock

import pytest
from fake_draft_model import FakeTarget, Guesser, computed, make, next_of


def test_what_the_target_has_computed_is_not_read_again():
    all_slots = []
    context, drafter = make(FakeTarget(all_slots))
    all_slots += computed(drafter, 300, 20)

    assert drafter.catch_up(all_slots)
    assert [drafter.lag(slot) for slot in all_slots] == [0, 0]
    drafts, _ = drafter.draft(all_slots, [Guesser()] * 2, 3, lambda _: True)

    assert context.calls == [2, 2, 2]
    assert drafts[0][0] == next_of(all_slots[0].tokens)


def test_taking_over_many_slots_is_spread_over_steps(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(clock, "perf_counter", lambda: now[0])
    all_slots = []
    context, drafter = make(FakeTarget(all_slots))
    take = context.take

    def slowly(slot, other):
        now[0] += 0.04
        return take(slot, other)

    context.take = slowly
    all_slots += computed(drafter, 90, 90, 90)

    assert not drafter.catch_up(all_slots)
    assert [drafter.lag(slot) for slot in all_slots] == [0, 0, 89]
    assert drafter.catch_up(all_slots)
    assert [drafter.lag(slot) for slot in all_slots] == [0, 0, 0]
    assert context.taken == 3


def test_a_few_tokens_are_read_where_that_is_sooner_than_taking_all_over():
    all_slots = []
    context, drafter = make(FakeTarget(all_slots))
    drafter._taken_seconds = 1.0
    all_slots += computed(drafter, 30)

    assert drafter.catch_up(all_slots)
    assert context.taken == 0
    assert context.calls == [29]


def test_what_llama_cpp_does_not_hand_over_is_read_and_not_asked_for_again():
    all_slots = []
    context, drafter = make(FakeTarget(all_slots))
    context.refuses_taking = True
    all_slots += computed(drafter, 30, 40)

    assert drafter.catch_up(all_slots)
    assert context.taken == 1
    assert context.calls == [29, 39]
    assert drafter.lag(all_slots[0]) == 0


def test_taking_over_is_reckoned_with_at_what_it_takes():
    all_slots = []
    _, drafter = make(FakeTarget(all_slots))
    all_slots += computed(drafter, 300)
    before = drafter.catch_up_seconds(all_slots[0])
    drafter.catch_up(all_slots)

    assert drafter.catch_up_seconds(all_slots[0]) == 0
    drafter.took(0, 0, 0)
    assert 0 < drafter.catch_up_seconds(all_slots[0]) < before


@pytest.mark.parametrize(("passed", "taken"), [(0.0, 1), (10.0, 2)])
def test_what_the_draft_has_computed_is_taken_over_again_when_time_has_passed(
    monkeypatch, passed, taken
):
    now = [1000.0]
    monkeypatch.setattr(clock, "perf_counter", lambda: now[0])
    all_slots = []
    context, drafter = make(FakeTarget(all_slots))
    drafter.cost.measured = lambda rows, seconds: None
    (slot,) = computed(drafter, 30)
    all_slots.append(slot)
    drafter.catch_up(all_slots)
    (draft,), _ = drafter.draft(all_slots, [Guesser()], 3, lambda _: True)
    slot.tokens += draft[:2]
    slot.cached = len(slot.tokens) - 1
    drafter.accepted(slot.index, slot.cached)
    drafter._taken_seconds = 0.001
    now[0] += passed
    drafter.catch_up(all_slots)

    (draft,), _ = drafter.draft(all_slots, [Guesser()], 1, lambda _: True)

    assert context.taken == taken
    assert draft[0] == next_of(slot.tokens)
