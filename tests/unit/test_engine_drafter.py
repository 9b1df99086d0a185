"""The draft's cache against lists of tokens: what it holds for a slot is the slot's own text."""

import pytest
from fake_draft_model import SLOTS, VOCABULARY, FakeTarget, Guesser, begun, make, next_of
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from worker.engine.slots import Slot
from worker.engine.speculation.drafter import _CATCH_UP_ROWS

token = st.integers(0, VOCABULARY - 1)


class Following(RuleBasedStateMachine):
    """Sequences begin, go on with and without drafts, move, fail and end, as in `loop.py`."""

    def __init__(self):
        super().__init__()
        self.all = [Slot(index) for index in range(SLOTS)]
        self.context, self.drafter = make(self.kin())

    def kin(self):
        return None

    def busy(self):
        return [slot for slot in self.all if slot.busy]

    @precondition(lambda self: not all(slot.busy for slot in self.all))
    @rule(
        data=st.data(),
        fresh=st.lists(token, min_size=1, max_size=200),
        refuses=st.booleans(),
    )
    def begin(self, data, fresh, refuses):
        slot = data.draw(st.sampled_from([slot for slot in self.all if not slot.busy]))
        source = data.draw(st.sampled_from(self.all))
        computed = min(source.cached, len(source.tokens))
        reuse = data.draw(st.integers(0, computed))
        prompt = source.tokens[:reuse] + fresh
        self.context.refuses_copies = refuses
        self.drafter.took(slot.index, source.index, reuse)
        self.context.refuses_copies = False
        slot.tokens, slot.busy = prompt, True
        slot.cached = len(prompt) - 1

    @precondition(lambda self: self.busy())
    @rule(data=st.data(), tokens=st.lists(token, min_size=1, max_size=5))
    def go_on_without_drafts(self, data, tokens):
        slot = data.draw(st.sampled_from(self.busy()))
        slot.tokens += tokens
        slot.cached = len(slot.tokens) - 1

    @precondition(lambda self: self.busy())
    @rule(data=st.data())
    def retire(self, data):
        slot = data.draw(st.sampled_from(self.busy()))
        del slot.tokens[slot.cached :]
        slot.busy = False

    @rule(left=st.integers(0, SLOTS - 1), right=st.integers(0, SLOTS - 1))
    def swap(self, left, right):
        if left == right:
            return
        self.drafter.swapped(left, right)
        one, other = self.all[left], self.all[right]
        for name in ("tokens", "cached", "busy"):
            mine, its = getattr(one, name), getattr(other, name)
            setattr(one, name, its)
            setattr(other, name, mine)

    @precondition(lambda self: self.busy())
    @rule(
        data=st.data(),
        most=st.integers(1, 6),
        stop=st.integers(1, 6),
        dropped=st.integers(0, 1),
        fails=st.booleans(),
    )
    def draft(self, data, most, stop, dropped, fails):
        chosen = [slot for slot in self.busy() if data.draw(st.booleans())]
        if not chosen:
            return
        lags = [max(0, self.drafter.lag(slot)) for slot in chosen]
        before = len(self.context.calls)
        done = self.drafter.catch_up(chosen)
        caught = self.context.calls[before:]
        assert sum(caught) <= _CATCH_UP_ROWS
        assert all(1 <= rows <= _CATCH_UP_ROWS for rows in caught)
        if not done:
            assert sum(caught) == _CATCH_UP_ROWS
            assert sum(lags) > _CATCH_UP_ROWS
            return
        told = []
        drafts, sure = self.drafter.draft(
            chosen,
            [Guesser() for _ in chosen],
            most,
            lambda sureness: told.append(list(sureness)) or len(told) < stop,
        )
        made = min(most, stop)
        assert len(told) == made
        assert [list(each) for each in zip(*sure, strict=True)] == told
        for slot, draft in zip(chosen, drafts, strict=True):
            text = list(slot.tokens)
            for guess in draft:
                assert guess == next_of(text)
                text.append(guess)
            assert len(draft) == made
        # what is not worth its row is dropped, at most the last token
        kept = max(0, made - dropped)
        for slot, draft in zip(chosen, drafts, strict=True):
            if fails and slot is chosen[0]:
                slot.cached = len(slot.tokens)
                slot.busy = False
                continue
            accepted = data.draw(st.integers(0, kept))
            slot.tokens += draft[:accepted]
            slot.tokens.append(data.draw(token))
            slot.cached = len(slot.tokens) - 1
            if kept:
                self.drafter.accepted(slot.index, slot.cached)

    @invariant()
    def the_cache_holds_the_slots_own_tokens(self):
        for slot in self.all:
            held = self.context.cache[slot.index]
            valid = self.drafter._valid[slot.index]
            assert len(held) == self.drafter._computed[slot.index]
            assert valid <= min(len(held), len(slot.tokens))
            assert held[:valid] == slot.tokens[:valid]

    @invariant()
    def a_running_sequence_is_known_up_to_its_last_token_at_most(self):
        for slot in self.busy():
            assert self.drafter.lag(slot) >= 0
            assert self.drafter._computed[slot.index] == self.drafter._valid[slot.index]


class TakingOver(Following):
    """The same of a draft that takes over what the target has computed, until that is refused."""

    def kin(self):
        return FakeTarget(self.all)

    @rule()
    def refuse(self):
        self.context.refuses_taking = True


TestFollowing = Following.TestCase
TestTakingOver = TakingOver.TestCase


def test_slots_draft_together_one_pass_a_token():
    context, drafter = make()
    slots = begun(drafter, 3, 2, 2)
    assert drafter.catch_up(slots)
    context.calls.clear()

    drafter.draft(slots, [Guesser()] * 3, 4, lambda _: True)

    assert context.calls == [6, 3, 3, 3]


def test_a_long_prompt_is_caught_up_with_over_several_steps():
    context, drafter = make()
    slots = begun(drafter, 300, 20)

    assert [drafter.catch_up(slots) for _ in range(3)] == [False, False, True]
    assert context.calls == [128, 128, 43, 19]
    assert [drafter.lag(slot) for slot in slots] == [0, 0]


def test_what_every_call_takes_is_measured():
    context, drafter = make()
    measured = []
    drafter.cost.measured = lambda rows, seconds: measured.append((rows, seconds > 0))
    slots = begun(drafter, 9)
    drafter.catch_up(slots)
    drafter.draft(slots, [Guesser()], 2, lambda _: True)

    assert measured == [(rows, True) for rows in context.calls]


def test_a_call_that_fails_is_an_error():
    context, drafter = make()
    slots = begun(drafter, 9)
    context.code = 1

    with pytest.raises(RuntimeError, match="returned 1 for 8 rows"):
        drafter.catch_up(slots)


def test_slots_that_cannot_be_swapped_are_an_error():
    context, drafter = make()
    drafter.catch_up(begun(drafter, 9, 9))
    context.refuses_copies = True

    with pytest.raises(RuntimeError, match="could not swap the draft's slots 0 and 1"):
        drafter.swapped(0, 1)
