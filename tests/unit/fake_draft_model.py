"""A draft model that computes nothing: what follows depends on every token, so that it shows at
once where it goes by other tokens than the slot's.
"""

import numpy as np

from worker.engine.slots import Slot
from worker.engine.speculation.costs import StepCost
from worker.engine.speculation.drafter import Drafter

__all__ = (
    "SLOTS",
    "VOCABULARY",
    "FakeContext",
    "FakeTarget",
    "Guesser",
    "begun",
    "computed",
    "make",
    "next_of",
)

SLOTS = 3
VOCABULARY = 7
STEP_TOKENS = 128


def next_of(tokens):
    """What the fake draft model says next: something that depends on every token."""
    value = 1
    for token in tokens:
        value = (value * 31 + token + 1) % 10_007
    return value % VOCABULARY


class FakeContext:
    """A cache of lists; refuses rows that do not follow what their slot holds."""

    slots = SLOTS

    def __init__(self):
        self.cache = [[] for _ in range(SLOTS)]
        self.refuses_copies = self.refuses_taking = False
        self.taken = 0
        self.code = 0
        self.calls = []
        self._outputs = []

    def decode(self, batch, rows):
        self.calls.append(rows)
        if self.code:
            return self.code
        self._outputs = []
        slots = [int(slot) for slot in batch.slot[:rows]]
        assert slots == sorted(slots), "llama.cpp finds only ascending slots together"
        for row, slot in enumerate(slots):
            held = self.cache[slot]
            assert int(batch.position[row]) == len(held), "rows go on where the cache ends"
            held.append(int(batch.token[row]))
            if batch.output[row]:
                self._outputs.append(next_of(held))
        return 0

    def logits(self, outputs):
        assert outputs == len(self._outputs)
        # tokens that only the draft knows are the likeliest, and must not be looked at
        rows = np.zeros((outputs, VOCABULARY + 2), np.float32)
        rows[:, VOCABULARY:] = 9.0
        rows[range(outputs), self._outputs] = 1.0
        return rows

    def forget(self, slot, start=0):
        del self.cache[slot][start:]
        return True

    def copy(self, source, target):
        if self.refuses_copies:
            return False
        self.cache[target] = list(self.cache[source])
        return True

    def swap(self, left, right):
        if self.refuses_copies:
            return False
        self.cache[left], self.cache[right] = self.cache[right], self.cache[left]
        return True

    def take(self, slot, other):
        self.taken += 1
        self.cache[slot] = [] if self.refuses_taking else other.held(slot)
        return not self.refuses_taking


class FakeTarget:
    """What the target has computed of its slots."""

    def __init__(self, slots):
        self.slots = slots

    def held(self, index):
        slot = self.slots[index]
        return slot.tokens[: slot.cached]


class Guesser:
    def guess(self, row):
        assert len(row) == VOCABULARY
        return int(row.argmax()), float(row.max())


def make(kin=None):
    context = FakeContext()
    drafter = Drafter(context, StepCost(), step_tokens=STEP_TOKENS, vocabulary=VOCABULARY, kin=kin)
    return context, drafter


def begun(drafter, *sizes):
    slots = []
    for index, size in enumerate(sizes):
        slot = Slot(index)
        slot.tokens = list(np.arange(size) % VOCABULARY)
        drafter.took(index, index, 0)
        slots.append(slot)
    return slots


def computed(drafter, *sizes):
    slots = begun(drafter, *sizes)
    for slot in slots:
        slot.cached = len(slot.tokens) - 1
    return slots
