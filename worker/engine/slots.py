"""Slots: which sequence lives where in the KV cache, whose tokens can be reused. Pure policy.

A slot keeps its tokens after its sequence has retired, until the room is needed. Two wishes pull on
the choice of a slot: reuse of a prefix that is there already, and compactness, since llama.cpp
computes only consecutive slots in one pass. A copy costs about ten microseconds a token and a
prefill a thousand, so compactness wins and a prefix that lies elsewhere is copied.
"""

from collections.abc import Sequence as Tokens

import msgspec

from worker.engine.tiles import Spans, Tiles

__all__ = ("LEAST_COPY", "TOKENS_A_GAP_STEP", "Placement", "Slot", "Slots", "common_prefix", "hole")

LEAST_COPY = 16
"""Tokens below which copying a prefix is not worth a call."""

TOKENS_A_GAP_STEP = 1024
"""Tokens that can be copied in the time that one step loses to a gap between busy slots.

Measured with SmolLM2-135M Q4_0: a gap costs a step 6 to 20 ms, a copied token 7 us. A move is made
once the gap has cost as much, as one buys skis after renting them for their price: never more than
twice what the best choice, known only later, would have cost.
"""

_DEFER_GAIN = 32
"""A request waits for a running prefill that will save it at least this many tokens."""


class Slot:
    """One stream of the KV cache: the tokens it is to hold, of which `cached` are computed."""

    __slots__ = ("busy", "cached", "index", "prompt_size", "spans", "tokens", "used")

    def __init__(self, index: int) -> None:
        self.index = index
        self.tokens: list[int] = []
        self.cached = 0
        self.spans: Spans = ()
        """Which of them are computed in whole tiles."""
        self.prompt_size = 0
        self.busy = False
        self.used = 0
        """Tick of the last use, for LRU."""


class Placement(msgspec.Struct, frozen=True):
    """Put the sequence into `slot`; its first `reuse` tokens are taken from slot `source`."""

    slot: int
    source: int
    reuse: int
    spans: Spans = ()
    """Which tokens of the sequence were or will be computed in whole tiles."""


def common_prefix(left: Tokens[int], right: Tokens[int], limit: int) -> int:
    """Length of the longest common prefix, at most `limit`.

    Halves the range with slice comparisons, which run in C, instead of looping over tokens.
    """
    high = min(len(left), len(right), limit)
    if left[:high] == right[:high]:
        return high
    low = 0
    while high - low > 1:
        middle = (low + high) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle
    return low


def hole(active: Tokens[int]) -> tuple[int, int] | None:
    """(The highest busy slot, the lowest gap below it), or None if there is no gap."""
    if not active:
        return None
    low, high = min(active), max(active)
    if high - low + 1 == len(active):
        return None
    taken = set(active)
    return high, next(index for index in range(low, high) if index not in taken)


class Slots:
    """All slots of an engine, and the rule by which their prompts are computed in tiles."""

    def __init__(self, count: int, tiles: Tiles | None = None) -> None:
        self.all = [Slot(index) for index in range(count)]
        self.tiles = Tiles() if tiles is None else tiles
        self._tick = 0

    @property
    def active(self) -> list[int]:
        """Numbers of the busy slots, ascending."""
        return [slot.index for slot in self.all if slot.busy]

    def place(self, prompt: list[int], spans: Spans = ()) -> Placement | None:
        """Choose a slot for a prompt of at least one token; None: none is free, or it pays to wait.

        Its `spans` are to be computed in whole tiles.

        At least two tokens are left to compute where there are two: a single row is rounded in
        another way than several (design, section 8), and the logits of the last are needed.
        """
        idle = [slot for slot in self.all if not slot.busy]
        if not idle:
            return None
        limit = max(0, len(prompt) - 2)
        computed: dict[int, int] = {}
        coming = 0
        for slot in self.all:
            shared = common_prefix(slot.tokens, prompt, limit)
            computed[slot.index] = min(shared, slot.cached)
            if slot.busy and slot.cached < slot.prompt_size:
                coming = max(coming, min(shared, slot.prompt_size))
        source = max(self.all, key=lambda slot: (computed[slot.index], slot.used))
        reuse = computed[source.index]
        if coming >= reuse + _DEFER_GAIN:
            return None
        target = self._target(idle, computed)
        if computed[target.index] + LEAST_COPY > reuse:
            source, reuse = target, computed[target.index]
        reuse, spans = self.tiles.reuse(reuse, source.spans, spans)
        if not reuse:
            source = target
        return Placement(target.index, source.index, reuse, spans)

    def _target(self, idle: list[Slot], computed: dict[int, int]) -> Slot:
        active = self.active
        if active:
            low, high = active[0], active[-1]
            inside = [slot for slot in idle if low < slot.index < high]
            idle = inside or [slot for slot in idle if slot.index in (low - 1, high + 1)] or idle
        # the longest reuse in place, else the slot whose tokens were not used for longest
        return min(idle, key=lambda slot: (-computed[slot.index], slot.used, slot.index))

    def displaced(self, placement: Placement, prompt: list[int]) -> list[int]:
        """The computed tokens in the placement's slot if they would be lost with `take`, else none.

        They are not lost where the prompt, or what another slot holds, begins with nearly all of
        them. To be asked before anything is copied into the slot.
        """
        slot = self.all[placement.slot]
        held = slot.tokens[: slot.cached]
        size = len(held)
        others = (other for other in self.all if other is not slot)
        kept = max(
            common_prefix(held, prompt, size),
            *(common_prefix(held, other.tokens, other.cached) for other in others),
            0,
        )
        return held if size - kept >= LEAST_COPY else []

    def take(self, placement: Placement, tokens: list[int], prompt_size: int | None = None) -> Slot:
        """Mark the slot busy with a sequence, of which `placement.reuse` tokens are computed.

        Its first `prompt_size` tokens are its prompt; all of them unless said otherwise.
        """
        slot = self.all[placement.slot]
        slot.tokens = list(tokens)
        slot.cached = placement.reuse
        slot.spans = placement.spans
        slot.prompt_size = len(tokens) if prompt_size is None else prompt_size
        slot.busy = True
        self._touch(slot)
        self._touch(self.all[placement.source])
        return slot

    def release(self, slot: Slot) -> None:
        """The sequence has retired; its computed tokens stay for reuse."""
        del slot.tokens[slot.cached :]
        slot.busy = False
        self._touch(slot)

    def swap(self, source: int, target: int) -> Slot:
        """The running sequence of `source` lives in `target` from now on, and what lay there in
        `source`: it ended a moment ago, and the next turn of its conversation may go on from it.
        """
        old, new = self.all[source], self.all[target]
        old.tokens, new.tokens = new.tokens, old.tokens
        old.cached, new.cached = new.cached, old.cached
        old.spans, new.spans = new.spans, old.spans
        old.prompt_size, new.prompt_size = new.prompt_size, old.prompt_size
        old.busy, new.busy = new.busy, old.busy
        old.used, new.used = new.used, old.used
        return new

    def _touch(self, slot: Slot) -> None:
        self._tick += 1
        slot.used = self._tick
