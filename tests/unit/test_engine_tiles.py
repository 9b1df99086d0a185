"""Tiles: which rows of a prompt are computed in them, whatever is there of it already."""

from hypothesis import given
from hypothesis import strategies as st

from worker.engine.slots import Slots, common_prefix
from worker.engine.tiles import Ahead, Reuse, Spans, Tiles, ahead, cut, tiled

TILE = 8
END = 1_000_000
"""The token with which a message ends."""
ENDS = frozenset({END})


def in_tiles(spans: Spans, size: int) -> list[bool]:
    """By token."""
    return [any(first <= at < end for first, end in spans) for at in range(size)]


@given(st.integers(0, 2000))
def test_two_tokens_at_least_are_left_behind_the_tiles(size):
    rows = tiled(size, 64)

    assert rows % 64 == 0
    assert size <= 2 or 2 <= size - rows <= 65
    assert tiled(size, 0) == 0


def test_each_message_has_its_own_tiles():
    rule = Tiles(64)
    prompt = [*range(100), END, *range(30), END, *range(200), END, 7, 8]

    assert rule.of(prompt, ENDS) == ((0, 64), (132, 324))
    assert rule.of(prompt, frozenset()) == ((0, 320),)
    assert Tiles().of(prompt, ENDS) == ()
    # A prompt may begin with an end token.
    assert rule.of([END, END, *range(70)], ENDS) == ((2, 66),)
    assert rule.of([END, *range(70)], ENDS) == ((0, 64),)


messages = st.lists(st.lists(st.integers(0, 3), max_size=30), max_size=6)


@given(messages, messages)
def test_what_follows_a_message_changes_nothing_in_it(before, after):
    rule = Tiles(TILE)
    first = [token for message in before for token in (*message, END)]
    whole = [*first, *(token for message in after for token in (*message, END))]

    longer = cut(rule.of(whole, ENDS), len(first))
    # The last end token may be a message's first, and there is no message of one token.
    assert cut(longer, len(first) - 1) == cut(rule.of(first, ENDS), len(first) - 1)


def test_what_comes_next_is_all_of_one_kind():
    spans = ((10, 26), (40, 48))

    assert [ahead(spans, at, 60) for at in (0, 9, 10, 18, 26, 40, 48, 59)] == [
        Ahead(10, wide=False),
        Ahead(1, wide=False),
        Ahead(16, wide=True),
        Ahead(8, wide=True),
        Ahead(14, wide=False),
        Ahead(8, wide=True),
        Ahead(12, wide=False),
        Ahead(1, wide=False),
    ]
    assert ahead((), 5, 60) == Ahead(55, wide=False)


def test_less_than_a_tile_is_computed_once_more():
    rule = Tiles(64)

    # A common beginning of 1,500 tokens, then questions.
    assert rule.reuse(1500, ((0, 1472),), ((0, 1472),)) == Reuse(1500, ((0, 1472),))
    assert rule.reuse(1500, ((0, 1472),), ((0, 1536),)) == Reuse(1472, ((0, 1536),))
    assert rule.reuse(1500, ((0, 1536),), ((0, 1472),)) == Reuse(1472, ((0, 1472),))
    # All of the prompt is there.
    assert rule.reuse(198, ((0, 192),), ((0, 192),)) == Reuse(198, ((0, 192),))
    # Behind the prompt is an answer of 100 tokens, and its message is to be in tiles.
    assert rule.reuse(300, ((0, 192),), ((0, 192), (197, 261), (305, 369))) == Reuse(
        300, ((0, 192), (305, 369))
    )
    # The same, and its message goes on.
    goes_on = ((0, 192), (197, 389))
    assert rule.reuse(300, ((0, 192),), goes_on) == Reuse(300, ((0, 192), (300, 364)))
    # A row alone would be left before the next message's tiles.
    following = ((0, 192), (201, 265))
    assert rule.reuse(200, ((0, 192),), following) == Reuse(199, following)
    following = ((0, 192), (197, 261), (301, 365))
    assert rule.reuse(300, ((0, 192),), following) == Reuse(299, ((0, 192), (301, 365)))
    assert Tiles().reuse(300, (), ()) == Reuse(300, ())
    assert rule.reuse(0, ((0, 192),), ((0, 64),)) == Reuse(0, ((0, 64),))


@given(
    st.lists(
        st.tuples(
            st.integers(0, 60),
            st.lists(st.integers(1, 40), min_size=1, max_size=4),
            st.integers(0, 30),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_a_reused_prefix_is_as_if_computed_anew_but_where_that_would_be_dear(asked):
    """Each has so many tokens in common with the first, messages of its own, and an answer."""
    slots = Slots(2, Tiles(TILE))
    computed: list[list[bool]] = [[], []]
    for number, (common, own, answer) in enumerate(asked, start=1):
        shared = [END if token % 25 == 24 else token for token in range(common)]
        prompt = [*shared, 5, 5]
        for size in own:
            prompt += [*range(1000 * number, 1000 * number + size), END]
        prompt += [5, 5]
        wanted = slots.tiles.of(prompt, ENDS)
        placement = slots.place(prompt, wanted)
        assert placement is not None
        assert placement.reuse <= len(prompt) - 2
        slot = slots.take(placement, prompt)
        there = computed[placement.source][: placement.reuse]
        assert in_tiles(placement.spans, placement.reuse) == there
        anew = in_tiles(wanted, len(prompt))
        now = in_tiles(placement.spans, len(prompt))
        if now != anew:
            # From there on more than a tile would have been computed once more.
            begin = common_prefix(now, anew, len(prompt))
            begin -= next(((begin - a) % TILE for a, b in wanted if a < begin < b), 0)
            assert placement.reuse + 1 - begin >= TILE
        for first, end in placement.spans:
            start = max(first, placement.reuse)
            assert end <= start or (end - start) % TILE == 0
        step = ahead(placement.spans, placement.reuse, len(prompt))
        assert step.rows >= 2
        # An answer's tokens are computed one by one.
        slot.tokens += range(-answer, 0)
        slot.cached = len(slot.tokens)
        computed[slot.index] = [*now, *[False] * answer]
        slots.release(slot)
