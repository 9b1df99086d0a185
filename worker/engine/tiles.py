"""Which rows of a prompt are computed in whole tiles: its tokens alone say it.

Where a row is rounded otherwise among many of its sequence than among few (`Decoder.tile`), each
message of a prompt is computed as if it were a prompt of its own: as many whole tiles as it has,
and its rest in pieces smaller than a tile. So neither the clock, nor company, nor how far a cache
reached has an effect on a logit, nor on a token. And nothing changes for a message when others
follow, so that a conversation's next turn finds it as it wants it.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

__all__ = ("Ahead", "Reuse", "Spans", "Tiles", "ahead", "cut", "tiled")

Spans = tuple[tuple[int, int], ...]
"""Where rows are computed in whole tiles: (first token, token behind the last), ascending."""
_LEAST_MESSAGE = 2
"""Tokens: some prompts begin with an end token, and a row alone may be rounded in a way of its own,
so that two at least are left over everywhere."""


class Ahead(NamedTuple):
    """The next rows of a prompt that are computed in the same way."""

    rows: int
    wide: bool
    """In whole tiles."""


class Reuse(NamedTuple):
    """What a sequence begins with."""

    tokens: int
    spans: Spans
    """Of these tokens as they were computed, of those behind them as they are to be."""


def tiled(size: int, tile: int) -> int:
    """Of so many tokens the first ones, to be computed in whole tiles; 0 where `tile` is."""
    return (size - _LEAST_MESSAGE) // tile * tile if tile and size > _LEAST_MESSAGE else 0


def cut(spans: Spans, end: int) -> Spans:
    """As much of the spans as lies before `end`."""
    return tuple((first, min(behind, end)) for first, behind in spans if first < end)


def ahead(spans: Spans, computed: int, size: int) -> Ahead:
    """What comes next of a prompt of `size` tokens, the first `computed` of which are done."""
    after = bisect_right(spans, computed, key=_first)
    if after and computed < spans[after - 1][1]:
        return Ahead(spans[after - 1][1] - computed, wide=True)
    end = spans[after][0] if after < len(spans) else size
    return Ahead(end - computed, wide=False)


class Tiles:
    """The rule for one engine.

    Args:
        size: rows of a tile; 0: how many are computed together makes no difference, or only pieces
            smaller than a tile are computed at all.
    """

    def __init__(self, size: int = 0) -> None:
        self._size = size

    def of(self, prompt: Sequence[int], ends: frozenset[int]) -> Spans:
        """The spans of a prompt, whose messages end with one of these tokens."""
        if not tiled(len(prompt), self._size):
            return ()
        spans = []
        begin = 0
        for end in (*(i for i, token in enumerate(prompt, 1) if token in ends), len(prompt)):
            if end - begin >= _LEAST_MESSAGE:
                if rows := tiled(end - begin, self._size):
                    spans.append((begin, begin + rows))
                begin = end
        return tuple(spans)

    def reuse(self, there: int, have: Spans, wanted: Spans) -> Reuse:
        """How much of a prefix that is there to begin with, so that all is as if computed anew.

        Less than a tile is computed once more for that. Where it would be more, as behind an answer
        of many tokens, which were computed one by one, the prefix is used as it is.

        Args:
            there: tokens of the prefix.
            have: how they were computed.
            wanted: the spans of the prompt.
        """
        tile = self._size
        if not tile or not there:
            return Reuse(there, wanted)
        have = cut(have, there)
        same = _same(have, cut(wanted, there), there)
        begin = _boundary(same, wanted, tile)
        if there - begin < tile:
            return Reuse(begin, _joined(cut(have, begin), _behind(wanted, begin, tile)))
        there = _in_company(there, wanted)
        return Reuse(there, _joined(cut(have, there), _behind(wanted, there, tile)))


def _first(span: tuple[int, int]) -> int:
    return span[0]


def _joined(before: Spans, after: Spans) -> Spans:
    """Both, one behind the other; where they touch, as one span."""
    if before and after and before[-1][1] == after[0][0]:
        return (*before[:-1], (before[-1][0], after[0][1]), *after[1:])
    return (*before, *after)


def _same(left: Spans, right: Spans, end: int) -> int:
    """Up to where both compute all rows before `end` alike."""
    for mine, other in zip(chain.from_iterable(left), chain.from_iterable(right), strict=False):
        if mine != other:
            return min(mine, other)
    longer = left if len(left) > len(right) else right
    shorter = min(len(left), len(right))
    return longer[shorter][0] if shorter < len(longer) else end


def _boundary(at: int, spans: Spans, tile: int) -> int:
    """The last token up to `at` from which on the spans can be computed as they are."""
    for first, behind in spans:
        if first < at < behind:
            return at - (at - first) % tile
    return _in_company(at, spans)


def _in_company(at: int, spans: Spans) -> int:
    """The same, or one token before, where a row alone would be left in front of a span."""
    return at - 1 if any(first == at + 1 for first, _ in spans) else at


def _behind(spans: Spans, begin: int, tile: int) -> Spans:
    """What lies behind `begin`, in whole tiles from there on where it lies within a span."""
    rest = []
    for first, behind in spans:
        start = max(first, begin)
        if (rows := (behind - start) // tile * tile) > 0:
            rest.append((start, start + rows))
    return tuple(rest)
