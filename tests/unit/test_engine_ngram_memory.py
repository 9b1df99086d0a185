"""N-gram memory: owners are kept apart, bounds hold, what is found is really there."""

import random
from array import array

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from worker.engine.speculation.memory import _LEAST_CHARGE, LONGEST, Memory

LIMIT = 1000


def charge(tokens):
    return max(len(tokens), _LEAST_CHARGE)


class Memories(RuleBasedStateMachine):
    """Against lists: per owner all that was ever remembered, and what was recalled since when."""

    def __init__(self):
        super().__init__()
        self.memory = Memory(LIMIT)
        self.told = {}

    @rule(
        owner=st.sampled_from(["", "ann", "bob", "cyd"]),
        prompt=st.lists(st.integers(0, 2), min_size=1, max_size=200),
        output=st.lists(st.integers(0, 2), max_size=400),
    )
    def remember(self, owner, prompt, output):
        self.memory.remember(owner, prompt + output, len(prompt))
        self.told.setdefault(owner, []).append(prompt + output)
        fits = charge(prompt + output) <= (LIMIT // 2)
        found = self.memory.recall(owner, prompt)
        if owner and fits:
            assert found is not None
            assert found.end == len(prompt)
            assert list(found.tokens[: len(prompt)]) == prompt
            assert list(found.tokens[: len(prompt + output)]) == prompt + output
        if not owner:
            assert found is None

    @rule(
        owner=st.sampled_from(["", "ann", "bob", "cyd"]),
        suffix=st.lists(st.integers(0, 2), max_size=30),
    )
    def find(self, owner, suffix):
        found = self.memory.find(owner, array("i", suffix))
        if found is None:
            return
        assert 4 <= found.match <= LONGEST
        assert list(found.tokens[found.end - found.match : found.end]) == suffix[-found.match :]
        assert found.end < len(found.tokens)
        assert list(found.tokens) in self.told[owner]

    @invariant()
    def bounds_hold(self):
        memory = self.memory
        owners = [owner for owner in ("ann", "bob", "cyd") if memory.share(owner)]
        assert memory.share("") == 0
        assert memory.tokens == sum(memory.share(owner) for owner in owners)
        assert memory.tokens <= LIMIT
        if len(owners) > 1:
            assert all(memory.share(owner) <= LIMIT // 2 for owner in owners)


Memories.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestMemories = Memories.TestCase


@given(st.lists(st.integers(0, 2), min_size=20, max_size=60), st.data())
def test_nothing_of_one_owner_is_found_by_another(tokens, data):
    memory = Memory(10_000)
    memory.remember("ann", tokens, 10)
    end = data.draw(st.integers(0, len(tokens)))

    for stranger in ("", "bob"):
        assert memory.find(stranger, array("i", tokens[:end])) is None
        assert memory.recall(stranger, tokens[:10]) is None


def test_nearly_every_place_of_much_text_is_found_by_the_longest_match():
    draw = random.Random(1)
    texts = [[draw.randrange(40_000) for _ in range(1000)] for _ in range(40)]
    memory = Memory(1 << 20)
    for text in texts:
        memory.remember("me", text, 500)

    places = [(text, end) for text in texts for end in range(LONGEST, 1000, 7)]
    found = [
        occurrence is not None
        and (occurrence.match, list(occurrence.tokens), occurrence.end) == (LONGEST, text, end)
        for text, end in places
        for occurrence in [memory.find("me", array("i", text[end - LONGEST : end]))]
    ]

    # a place of the table that two share loses one of them; which ones is fixed by the hash
    assert sum(found) > 0.8 * len(places)


def test_a_longer_turn_of_a_conversation_takes_the_place_of_the_shorter():
    memory = Memory(10_000)
    turns = [list(range(size)) for size in (100, 200, 300)]
    for turn in turns:
        memory.remember("me", turn, len(turn) - 20)

    assert len(memory) == 1
    assert memory.tokens == 300


def test_repeating_an_answer_takes_no_more_room():
    memory = Memory(10_000)
    for _ in range(5):
        memory.remember("me", list(range(100)), 60)

    assert memory.tokens == 100


def test_zeros_at_the_end_make_another_sequence():
    memory = Memory(10_000)
    memory.remember("me", [5] * 70 + [0, 0, 0], 70)
    memory.remember("me", [5] * 70, 60)

    assert len(memory) == 2


def test_a_cancelled_repetition_does_not_cut_what_is_known():
    memory = Memory(10_000)
    memory.remember("me", list(range(100)), 60)
    memory.remember("me", list(range(70)), 60)

    found = memory.recall("me", list(range(60)))

    assert found is not None
    assert list(found.tokens) == list(range(100))


def test_the_newest_answer_to_a_prompt_is_recalled():
    memory = Memory(10_000)
    for answer in (1, 2, 3):
        memory.remember("me", [9] * 60 + [answer] * 20, 60)

    found = memory.recall("me", [9] * 60)

    assert found is not None
    assert found.tokens[found.end] == 3


def test_the_least_recently_used_sequence_makes_room():
    memory = Memory(300)
    first, second, third = ([number] * 100 for number in (1, 2, 3))
    for text in (first, second, third):
        memory.remember("me", text, 50)
    assert memory.recall("me", first[:50]) is not None

    memory.remember("me", [4] * 100, 50)

    assert memory.recall("me", second[:50]) is None
    assert memory.recall("me", first[:50]) is not None
    assert memory.recall("me", third[:50]) is not None


def test_an_owner_who_has_all_gives_half_of_it_to_others():
    memory = Memory(1000)
    for number in range(10):
        memory.remember("ann", [number] * 100, 50)
    assert memory.share("ann") == 1000

    memory.remember("bob", [50] * 100, 50)

    assert memory.share("ann") == 500
    assert memory.share("bob") == 100


def test_a_memory_of_no_size_keeps_nothing():
    memory = Memory(0)
    memory.remember("me", list(range(100)), 50)

    assert len(memory) == 0
    assert memory.recall("me", list(range(50))) is None
