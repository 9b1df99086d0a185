"""Prefixes brought to a slot: what it then holds, what is found again, what a refusal costs."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from worker.engine.prefix_store import PrefixStore
from worker.engine.prefixes import Prefixes
from worker.engine.slots import LEAST_COPY, Placement, Slot, Slots, common_prefix, hole
from worker.engine.tiles import Tiles

PLENTY = 1 << 30
TOKEN_BYTES = 4
PIECE = LEAST_COPY + 4
"""Tokens in which the conversations of these tests grow and differ, so that whatever is lost of one
is worth keeping."""


class Cache:
    """A context of which a slot's state is the list of its tokens."""

    def __init__(self, slots: int, *, cuttable: bool = True) -> None:
        self.held: list[list[int]] = [[] for _ in range(slots)]
        self.refused: frozenset[str] = frozenset()
        """Operations that llama.cpp refuses."""
        self.saved = 0
        self._cuttable = cuttable

    def forget(self, slot: int, start: int = 0) -> bool:
        if 0 < start < len(self.held[slot]) and not self._cuttable:
            return False
        del self.held[slot][start:]
        return True

    def copy(self, source: int, target: int) -> bool:
        if "copy" in self.refused:
            return False
        self.held[target] = list(self.held[source])
        return True

    def swap(self, left: int, right: int) -> None:
        self.held[left], self.held[right] = self.held[right], self.held[left]

    def save(self, slot: int) -> np.ndarray | None:
        if "save" in self.refused:
            return None
        self.saved += 1
        return np.array(self.held[slot], dtype=np.int32).view(np.uint8)

    def restore(self, slot: int, state: np.ndarray) -> bool:
        self.held[slot] = state.view(np.int32).tolist()
        if "restore" in self.refused:
            self.held[slot] = [-1] * 7  # in doubt
            return False
        return True


class Engine:
    """Slots over a cache, and what the loop does with them."""

    def __init__(self, slots: int, memory: int, *, cuttable: bool = True, tile: int = 0) -> None:
        self.cache = Cache(slots, cuttable=cuttable)
        self.slots = Slots(slots, Tiles(tile))
        self.prefixes = Prefixes(self.cache, self.slots, memory)

    @property
    def store(self) -> PrefixStore | None:
        return self.prefixes._store

    def begin(self, prompt: list[int]) -> tuple[Slot, Placement, int]:
        """Place a prompt and bring its prefix; what is left of it is computed at once."""
        spans = self.slots.tiles.of(prompt, frozenset())
        placement = self.slots.place(prompt, spans)
        assert placement is not None
        brought = self.prefixes.bring(placement, prompt, spans)
        reuse = brought.reuse
        assert self.cache.held[placement.slot] == prompt[:reuse]
        slot = self.slots.take(brought, prompt)
        self.compute(slot)
        return slot, placement, reuse

    def compute(self, slot: Slot) -> None:
        self.cache.held[slot.index] += slot.tokens[slot.cached :]
        slot.cached = len(slot.tokens)

    def ask(self, prompt: list[int]) -> int:
        """A sequence from beginning to end; how much of it was there already."""
        slot, _, reuse = self.begin(prompt)
        self.slots.release(slot)
        return reuse


def test_what_comes_from_memory_is_as_if_computed_anew() -> None:
    tile = 64
    engine = Engine(1, PLENTY, tile=tile)
    first = conversation(0, 200)
    slot, _, _ = engine.begin(first)
    engine.slots.release(slot)
    engine.ask(conversation(1, 200))

    # 170 are in memory; of a prompt of 250 the first 192 are to be computed in tiles.
    _, _, reuse = engine.begin([*first[:170], *conversation(2, 80)])
    assert reuse == 128
    # Its message goes on where the first one's ended, and all of it is in tiles but the rest.
    assert engine.slots.all[0].spans == ((0, 192),)


def conversation(number: int, tokens: int = 2 * PIECE) -> list[int]:
    return list(range(1000 * number, 1000 * number + tokens))


class Conversations(RuleBasedStateMachine):
    """Conversations that branch and go on, in more of them than there are slots."""

    @initialize(
        slots=st.integers(1, 4),
        memory=st.sampled_from([0, 100, 50 * TOKEN_BYTES, 300 * TOKEN_BYTES, PLENTY, PLENTY]),
        cuttable=st.sampled_from([True, True, False]),
        sound=st.booleans(),
    )
    def start(self, slots: int, memory: int, cuttable: bool, sound: bool) -> None:
        self.engine = Engine(slots, memory, cuttable=cuttable)
        self.memory = memory
        self.sound = sound
        self.keeps_all = sound and cuttable and memory == PLENTY
        self.running: list[Slot] = []
        self.computed: list[list[int]] = [[]]

    @precondition(lambda self: len(self.running) < len(self.engine.slots.all))
    @rule(data=st.data(), new=st.lists(st.integers(0, 3), min_size=1, max_size=3))
    def ask(self, data: st.DataObject, new: list[int]) -> None:
        earlier = data.draw(st.sampled_from(self.computed))
        prompt = earlier + [token for number in new for token in [number] * PIECE]

        slot, placement, reuse = self.engine.begin(prompt)

        assert 0 <= reuse <= len(prompt) - 2
        if self.memory == 0:
            assert reuse in (0, placement.reuse)
        if self.keeps_all:
            limit = len(prompt) - 2
            known = max(common_prefix(there, prompt, limit) for there in self.computed)
            assert reuse > known - LEAST_COPY
        self.running.append(slot)
        self.computed.append(prompt)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), answer=st.integers(0, 9))
    def answer(self, data: st.DataObject, answer: int) -> None:
        slot = data.draw(st.sampled_from(self.running))
        self.running.remove(slot)
        slot.tokens += [answer] * PIECE
        self.engine.compute(slot)
        self.computed.append(list(slot.tokens))
        slot.tokens.append(10)  # sampled last and never computed
        self.engine.slots.release(slot)

    @precondition(lambda self: not self.sound)
    @rule(refused=st.frozensets(st.sampled_from(["copy", "save", "restore"])))
    def refuse(self, refused: frozenset[str]) -> None:
        self.engine.cache.refused = refused

    @rule()
    def close_gap(self) -> None:
        gap = hole(self.engine.slots.active)
        if gap is not None:
            old = self.engine.slots.all[gap[0]]
            self.engine.cache.swap(*gap)
            self.running[self.running.index(old)] = self.engine.slots.swap(*gap)

    @invariant()
    def slots_hold_what_they_say_and_memory_is_kept_to(self) -> None:
        engine = self.engine
        for slot in engine.slots.all:
            assert engine.cache.held[slot.index] == slot.tokens[: slot.cached]
        if engine.store is None:
            assert engine.cache.saved == 0
        else:
            assert engine.store.bytes <= self.memory


TestConversations = Conversations.TestCase
TestConversations.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)


def test_conversations_in_turn_are_found_again():
    engine = Engine(1, PLENTY)
    for number in range(3):
        assert engine.ask(conversation(number)) == 0

    for number in range(3):
        longer = [*conversation(number), 7, 8, 9]
        assert engine.ask(longer) == 2 * PIECE


def test_without_memory_nothing_is_saved_nor_found():
    engine = Engine(1, 0)
    for number in (0, 1):
        engine.ask(conversation(number))

    assert engine.ask([*conversation(0), 7, 8]) == 0
    assert engine.cache.saved == 0
    assert engine.ask([*conversation(0), 7, 8, 9, 10]) == 2 * PIECE + 2  # in its own slot still


def test_what_is_wanted_back_does_not_make_way_for_what_it_displaces():
    engine = Engine(1, 2 * PIECE * TOKEN_BYTES)
    for number in (0, 1, 2):
        engine.ask(conversation(number))

    assert engine.ask([*conversation(1), 7, 8]) == 2 * PIECE
    assert engine.ask([*conversation(0), 7, 8]) == 0


def test_what_is_stored_already_is_not_saved_again():
    engine = Engine(1, PLENTY)
    engine.ask(conversation(0))
    engine.ask(conversation(1))
    assert engine.cache.saved == 1
    engine.ask(conversation(0)[: 2 * PIECE - 1])  # its beginning, brought back
    assert engine.cache.saved == 2

    engine.ask(conversation(2))

    assert engine.cache.saved == 2


def test_a_prompt_that_is_all_there_leaves_two_tokens_to_compute():
    engine = Engine(1, PLENTY)
    engine.ask(conversation(0))
    engine.ask(conversation(1))

    assert engine.ask(conversation(0)) == 2 * PIECE - 2


def test_a_refused_restore_leaves_the_slot_empty():
    engine = Engine(1, PLENTY)
    engine.ask(conversation(0))
    engine.ask(conversation(1))
    engine.cache.refused = frozenset(("restore",))
    prompt = [*conversation(0), 7, 8]

    reuse = engine.prefixes.bring(engine.slots.place(prompt), prompt).reuse

    assert (reuse, engine.cache.held) == (0, [[]])


def test_a_refused_copy_leaves_the_slot_empty():
    engine = Engine(3, 0)
    running = [engine.begin(conversation(number))[0] for number in (0, 1, 2)]
    engine.slots.release(running[1])
    engine.cache.refused = frozenset(("copy",))
    prompt = [*conversation(0), 7, 8]
    placement = engine.slots.place(prompt)
    assert (placement.slot, placement.source) == (running[1].index, running[0].index)

    assert engine.prefixes.bring(placement, prompt).reuse == 0
    assert engine.cache.held[placement.slot] == []


def test_a_refused_save_costs_what_was_to_be_saved_alone():
    engine = Engine(1, PLENTY)
    engine.ask(conversation(0))
    engine.cache.refused = frozenset(("save",))
    engine.ask(conversation(1))
    engine.cache.refused = frozenset()

    assert engine.ask([*conversation(0), 7, 8]) == 0
    assert engine.ask([*conversation(1), 7, 8]) == 2 * PIECE


def test_what_cannot_be_cut_is_used_whole_or_not_at_all():
    engine = Engine(1, PLENTY, cuttable=False)
    engine.ask(conversation(0))
    engine.ask(conversation(1))

    assert engine.ask([*conversation(0), 7, 8]) == 2 * PIECE
    assert engine.ask([*conversation(1)[:PIECE], 7, 8]) == 0
