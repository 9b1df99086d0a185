"""Slots: reuse, compactness, and that a placement never promises tokens that are not there."""

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from worker.engine.slots import LEAST_COPY, Placement, Slot, Slots, common_prefix, hole
from worker.engine.tiles import Tiles

tokens = st.lists(st.integers(0, 3), max_size=80)


@given(tokens, tokens, st.integers(0, 90))
def test_common_prefix_is_the_longest_within_its_limit(left, right, limit):
    size = common_prefix(left, right, limit)

    assert size <= limit
    assert left[:size] == right[:size]
    assert size == min(len(left), len(right), limit) or left[size] != right[size]


@given(st.lists(tokens, min_size=1, max_size=4), tokens.filter(bool))
def test_what_is_displaced_is_nowhere_else(held, prompt):
    slots = Slots(len(held))
    for slot, there in zip(slots.all, held, strict=True):
        slot.tokens, slot.cached = there, len(there)
    placement = slots.place(prompt)

    displaced = slots.displaced(placement, prompt)

    there = held[placement.slot]
    after = [prompt, *(other for i, other in enumerate(held) if i != placement.slot)]
    lost = len(there) - max(common_prefix(there, other, len(there)) for other in after)
    assert displaced == (there if lost >= LEAST_COPY else [])


def test_a_conversation_that_goes_on_displaces_nothing():
    slots = Slots(2)
    turn = list(range(100))
    slot = slots.take(slots.place(turn), turn)
    slot.cached = 100
    slots.release(slot)
    other = slots.all[1 - slot.index]
    other.tokens, other.cached = list(range(500, 600)), 100
    longer, new = [*turn, 7, 8, 9], [9] * 50

    assert slots.displaced(slots.place(longer), longer) == []
    assert slots.displaced(slots.place(new), new) == other.tokens


def test_what_is_known_of_tiles_moves_with_the_tokens():
    slots = Slots(2, Tiles(64))
    slots.take(Placement(0, 0, 0, ((0, 192),)), list(range(200)))

    assert slots.swap(0, 1).spans == ((0, 192),)
    assert slots.all[0].spans == ()


@given(st.sets(st.integers(0, 31)))
def test_a_hole_is_named_exactly_when_the_busy_slots_are_not_consecutive(active):
    gap = hole(sorted(active))

    consecutive = not active or max(active) - min(active) + 1 == len(active)
    assert (gap is None) == consecutive
    if gap is not None:
        assert gap[0] == max(active)
        assert gap[1] not in active
        assert min(active) < gap[1] < gap[0]


def test_a_conversation_goes_back_to_the_slot_that_holds_it():
    slots = Slots(4)
    first = slots.take(slots.place(list(range(100))), list(range(100)))
    first.cached = 100
    slots.release(first)
    other = slots.take(slots.place([7] * 50), [7] * 50)
    other.cached = 50
    slots.release(other)

    placement = slots.place([*range(100), 5, 6, 7])

    assert (placement.slot, placement.source, placement.reuse) == (first.index, first.index, 100)


def test_a_prefix_beside_running_sequences_is_copied_next_to_them():
    slots = Slots(8)
    running = [slots.take(slots.place([i] * 40), [i] * 40) for i in range(3)]
    for slot in running:
        slot.cached = 40
    far = slots.all[6]
    far.tokens, far.cached = list(range(50, 150)), 100

    placement = slots.place([*range(50, 150), 1, 2])

    active = slots.active
    assert placement.source == 6
    assert placement.reuse == 100
    assert placement.slot in (active[0] - 1, active[-1] + 1)


def test_a_request_waits_for_the_prefill_that_computes_its_prefix():
    slots = Slots(4)
    prompt = list(range(300))
    slot = slots.take(slots.place(prompt), prompt)

    assert slots.place([*prompt, 1, 2]) is None

    slot.cached = 300
    assert slots.place([*prompt, 1, 2]).reuse == 300


def test_what_ended_in_a_gap_is_still_there_after_the_gap_is_closed():
    slots = Slots(3)
    prompts = [[7] * 50, list(range(100)), [8] * 50]
    for prompt in prompts:
        slots.take(slots.place(prompt), prompt).cached = len(prompt)
    slots.release(slots.all[1])
    gap = hole(slots.active)
    assert gap == (2, 1)

    moved = slots.swap(*gap)

    assert slots.active == [0, 1]
    assert (moved.index, moved.tokens) == (1, prompts[2])
    placement = slots.place([*range(100), 1, 2])
    assert (placement.source, placement.reuse) == (2, 100)


class SlotLife(RuleBasedStateMachine):
    """Random arrivals, progress, retirements and moves over five slots."""

    def __init__(self):
        super().__init__()
        self.slots = Slots(5)
        self.truth = {index: [] for index in range(5)}  # what the KV cache would really hold
        self.live: list[Slot] = []

    @rule(prompt=st.lists(st.integers(0, 2), min_size=1, max_size=90))
    def arrive(self, prompt):
        placement = self.slots.place(prompt)
        if placement is None:
            return
        assert not self.slots.all[placement.slot].busy
        assert placement.reuse <= max(0, len(prompt) - 2)
        assert self.truth[placement.source][: placement.reuse] == prompt[: placement.reuse]
        self.truth[placement.slot] = prompt[: placement.reuse]
        self.live.append(self.slots.take(placement, prompt))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), count=st.integers(1, 40))
    def compute(self, data, count):
        slot = data.draw(st.sampled_from(self.live))
        end = min(len(slot.tokens), slot.cached + count)
        self.truth[slot.index] += slot.tokens[slot.cached : end]
        slot.cached = end
        if end == len(slot.tokens):
            slot.tokens.append(1)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def retire(self, data):
        slot = data.draw(st.sampled_from(self.live))
        self.live.remove(slot)
        self.slots.release(slot)

    @rule()
    def close_gap(self):
        gap = hole(self.slots.active)
        if gap is None:
            return
        source, target = gap
        old = self.slots.all[source]
        self.truth[target], self.truth[source] = self.truth[source], self.truth[target]
        self.live[self.live.index(old)] = self.slots.swap(source, target)

    @invariant()
    def what_a_slot_says_is_what_the_cache_holds(self):
        for slot in self.slots.all:
            assert slot.tokens[: slot.cached] == self.truth[slot.index][: slot.cached]
            assert len(self.truth[slot.index]) >= slot.cached
        assert [s.index for s in self.slots.all if s.busy] == sorted(s.index for s in self.live)


TestSlotLife = SlotLife.TestCase
TestSlotLife.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
