"""Prefix store: against a plain list of entries, by every prefix; its bytes; what makes room."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from worker.engine.prefix_store import PrefixStore

LIMIT = 400


def state(size: int):
    return np.zeros(size, dtype=np.uint8)


def shared(left, right):
    size = 0
    while size < min(len(left), len(right)) and left[size] == right[size]:
        size += 1
    return size


# runs of one token, so that blocks are shared often and cut anywhere
tokens = st.lists(st.tuples(st.integers(0, 1), st.integers(1, 70)), min_size=1, max_size=5).map(
    lambda runs: [token for token, count in runs for _ in range(count)]
)


class Stores(RuleBasedStateMachine):
    """Beside a list of (tokens, bytes), the least recently used first."""

    def __init__(self):
        super().__init__()
        self.store = PrefixStore(LIMIT)
        self.known = []
        self.hits = 0

    @rule(tokens=tokens, size=st.integers(1, LIMIT + 50))
    def put(self, tokens, size):
        kept = self.store.put(tokens, state(size))

        assert kept == (size <= LIMIT)
        if kept:
            self.known = [k for k in self.known if k[0] != tokens[: len(k[0])]]
            while sum(k[1] for k in self.known) + size > LIMIT:
                del self.known[0]
            self.known.append((tokens, size))

    @rule(tokens=tokens, least=st.integers(0, 150))
    def find(self, tokens, least):
        hit = self.store.find(tokens, least)

        longest = max((shared(k[0], tokens) for k in self.known), default=0)
        assert (hit is not None) == (longest >= max(1, least))
        if hit is not None:
            self.hits += 1
            assert hit.shared == longest == shared(hit.entry.tokens, tokens)
            self.use(hit.entry.tokens, hit.entry.state.nbytes)

    @rule(tokens=tokens)
    def covers(self, tokens):
        covered = self.store.covers(tokens)

        able = [k for k in self.known if k[0][: len(tokens)] == tokens]
        assert covered == bool(able)
        if len(able) > 1:
            # which of them counts as used is the store's choice: ask it
            hit = self.store.find(tokens, len(tokens))
            self.hits += 1
            self.use(hit.entry.tokens, hit.entry.state.nbytes)
        elif able:
            self.use(*able[0])

    def use(self, tokens, size):
        self.known.remove((tokens, size))
        self.known.append((tokens, size))

    @invariant()
    def accounts_agree(self):
        assert self.store.bytes == sum(k[1] for k in self.known) <= LIMIT
        assert len(self.store) == len(self.known)
        assert self.store.hits == self.hits


Stores.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestStores = Stores.TestCase


@given(st.lists(tokens, min_size=1, max_size=6))
def test_an_emptied_store_holds_no_branch(sequences):
    store = PrefixStore(100)
    for sequence in sequences:
        store.put(sequence, state(60))
    store.put([7], state(100))

    assert len(store) == 1
    assert not store._root.below
    assert len(store._root.entries) == len(store._root.ending) == 1


def test_the_state_comes_back_as_it_was_given():
    store = PrefixStore(1000)
    given_state = np.arange(100, dtype=np.uint8)
    store.put(list(range(50)), given_state)

    hit = store.find([*range(40), 99], 16)

    assert hit is not None
    assert hit.shared == 40
    assert hit.entry.state is given_state


def test_of_equal_prefixes_the_newest_is_taken():
    store = PrefixStore(1000)
    for last in (1, 2, 3):
        store.put([5] * 32 + [last] * 16, state(10))

    hit = store.find([5] * 32 + [9] * 16, 16)

    assert hit is not None
    assert hit.entry.tokens[-1] == 3
