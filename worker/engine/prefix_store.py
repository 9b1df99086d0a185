"""Host memory for the KV of sequences whose slots were needed. A pure data structure.

The entries hang in a tree of blocks of 64 tokens, much as in SGLang's radix cache (Zheng et al.,
2024), so that the longest common prefix is found by walking the prompt once, however many entries
share its beginning; only those that agree up to the last common block are compared by token.

Measured on the project's 2-core machine, 500 entries of 4,000 tokens that have 1,500 in common:
0.15 ms to put one, 0.1 ms to find one.
"""

from collections import OrderedDict
from collections.abc import Sequence as Tokens

import msgspec
import numpy as np
from numpy.typing import NDArray

from worker.engine.slots import common_prefix
from worker.engine.tiles import Spans

__all__ = ("Entry", "Hit", "PrefixStore")

_BLOCK = 64


class Entry(msgspec.Struct, frozen=True, eq=False):
    """A sequence and what llama.cpp's cache held for it."""

    tokens: list[int]
    state: NDArray[np.uint8]
    spans: Spans = ()
    """Which of the tokens were computed in whole tiles."""


class Hit(msgspec.Struct, frozen=True):
    """An entry that shares its first `shared` tokens with the prompt that was asked for."""

    entry: Entry
    shared: int


class _Node:
    """The entries that begin with the blocks on the way to it."""

    __slots__ = ("below", "ending", "entries")

    def __init__(self) -> None:
        self.below: dict[tuple[int, ...], _Node] = {}
        self.entries: dict[int, Entry] = {}
        """By `id`; the newest comes last."""
        self.ending: dict[int, Entry] = {}
        """Those of them that have no whole block more."""


class PrefixStore:
    """At most `limit_bytes` of states; the least recently used goes first.

    Not counted are the tokens themselves and the tree: a few per cent for the smallest models.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._root = _Node()
        self._used: OrderedDict[int, Entry] = OrderedDict()
        """By `id`, the least recently used first."""
        self.bytes = 0
        """What the states take."""
        self.hits = 0
        """Prompts for which an entry was found."""

    def __len__(self) -> int:
        """Entries held."""
        return len(self._used)

    def covers(self, tokens: Tokens[int]) -> bool:
        """Whether an entry begins with all of these tokens, so that their state need not be kept.

        That entry counts as used.
        """
        found = self._longest(tokens, len(tokens))
        if found is None:
            return False
        self._used.move_to_end(id(found.entry))
        return True

    def put(self, tokens: Tokens[int], state: NDArray[np.uint8], spans: Spans = ()) -> bool:
        """Keep a sequence in place of those that are prefixes of it, or its equal.

        False: the state is larger than all there is room for. Takes the state as its own: nobody
        may write to it afterwards. The tokens are copied.
        """
        kept = list(tokens)
        if not kept or state.nbytes > self._limit:
            return False
        for shorter in self._prefixes(kept):
            self._drop(shorter)
        entry = Entry(kept, state, spans)
        while self.bytes + state.nbytes > self._limit:
            self._drop(next(iter(self._used.values())))
        node = self._root
        node.entries[id(entry)] = entry
        for block in _blocks(kept):
            node = node.below.setdefault(block, _Node())
            node.entries[id(entry)] = entry
        node.ending[id(entry)] = entry
        self._used[id(entry)] = entry
        self.bytes += state.nbytes
        return True

    def find(self, prompt: Tokens[int], least: int) -> Hit | None:
        """The entry that shares the longest prefix with a prompt; None: none shares `least` tokens.

        Of equals the newest is taken. It counts as used, and as a hit.
        """
        found = self._longest(prompt, max(1, least))
        if found is None:
            return None
        self._used.move_to_end(id(found.entry))
        self.hits += 1
        return found

    def _longest(self, prompt: Tokens[int], least: int) -> Hit | None:
        node, depth = self._root, 0
        for block in _blocks(prompt):
            below = node.below.get(block)
            if below is None:
                break
            node, depth = below, depth + _BLOCK
        if depth + _BLOCK <= least:
            return None
        rest = prompt[depth : depth + _BLOCK]
        if depth + len(rest) < least:
            return None
        best: Entry | None = None
        longest = max(-1, least - depth - 1)
        for entry in reversed(node.entries.values()):
            # only one that agrees in one token more than the best can be better
            decisive = depth + longest
            if longest >= 0 and entry.tokens[decisive : decisive + 1] != [rest[longest]]:
                continue
            shared = common_prefix(entry.tokens[depth : depth + _BLOCK], rest, _BLOCK)
            if shared > longest:
                best, longest = entry, shared
                if shared == len(rest):
                    break
        return None if best is None else Hit(best, depth + longest)

    def _prefixes(self, tokens: list[int]) -> list[Entry]:
        """The entries that are prefixes of `tokens`, or equal it."""
        found = []
        node: _Node | None = self._root
        blocks = iter(_blocks(tokens))
        while node is not None:
            found += [e for e in node.ending.values() if e.tokens == tokens[: len(e.tokens)]]
            block = next(blocks, None)
            node = None if block is None else node.below.get(block)
        return found

    def _drop(self, entry: Entry) -> None:
        key = id(entry)
        del self._used[key]
        self.bytes -= entry.state.nbytes
        node = self._root
        del node.entries[key]
        for block in _blocks(entry.tokens):
            below = node.below[block]
            del below.entries[key]
            if not below.entries:
                # all further down belonged to this entry alone
                del node.below[block]
                break
            node = below
        else:
            del node.ending[key]


def _blocks(tokens: Tokens[int]) -> list[tuple[int, ...]]:
    """The whole blocks of a sequence."""
    whole = len(tokens) - len(tokens) % _BLOCK
    return list(zip(*[iter(tokens[:whole])] * _BLOCK, strict=True))
