"""N-gram lookup: proposals repeat what came before, by the longest match; places are kept."""

from hypothesis import given
from hypothesis import strategies as st

from worker.engine.speculation.memory import LONGEST, Memory
from worker.engine.speculation.ngram import _CANDIDATES, LEAST, Lookup, Proposal

few = st.integers(0, 3)
prompts = st.lists(few, max_size=60)
pieces = st.lists(st.lists(few, min_size=1, max_size=5), max_size=12)


def shared(tokens: list[int], end: int, size: int) -> int:
    """Tokens before `end` that equal those before `size`."""
    match = 0
    while match < end and tokens[end - match - 1] == tokens[size - match - 1]:
        match += 1
    return match


def continuation(tokens: list[int], end: int, count: int) -> tuple[int, ...]:
    """What follows `end`, going round where it reaches the end of the text itself."""
    out = list(tokens)
    for at in range(end, end + count):
        out.append(out[at])
    return tuple(out[len(tokens) :])


@given(prompts, st.integers(1, 10))
def test_the_first_search_finds_the_longest_match_and_of_these_the_newest(tokens, limit):
    proposal = Lookup(tokens).propose(limit)

    size = len(tokens)
    ends = [end for end in range(size - 1, 0, -1) if shared(tokens, end, size) >= LEAST]
    if not ends:
        assert proposal is None
        return
    match = max(min(LONGEST, shared(tokens, end, size)) for end in ends[:_CANDIDATES])
    end = next(end for end in ends if min(LONGEST, shared(tokens, end, size)) == match)
    assert proposal is not None
    assert proposal.match == match
    assert proposal.source == "own"
    count = limit if match >= size - end else min(limit, size - end)
    assert proposal.tokens == continuation(tokens, end, count)


@given(prompts, pieces, st.integers(1, 10))
def test_what_is_proposed_followed_the_same_tokens_before(prompt, pieces, limit):
    tokens = list(prompt)
    lookup = Lookup(prompt)
    for piece in pieces:
        proposal = lookup.propose(limit)
        size = len(tokens)
        exact = [end for end in range(1, size) if shared(tokens, end, size) >= LEAST]
        assert (proposal is not None) == bool(exact)
        if proposal is not None:
            assert any(
                shared(tokens, end, size) >= proposal.match
                and continuation(tokens, end, limit)[: len(proposal.tokens)] == proposal.tokens
                for end in exact
            )
            assert proposal.match >= LEAST
            assert 1 <= len(proposal.tokens) <= limit
            longest = max(shared(tokens, end, size) for end in exact)
            if len(exact) <= _CANDIDATES:
                assert proposal.match >= min(LONGEST, longest)
        lookup.extend(piece)
        tokens += piece


def test_a_place_is_kept_while_it_is_borne_out():
    lookup = Lookup([1, 2, 3, 10, 11, 12, 13, 14, 1, 2, 3, 20, 21, 9, 1, 2, 3])
    assert lookup.propose(2) == Proposal((20, 21), 3, "own")

    lookup.extend([20])
    assert lookup.propose(2) == Proposal((21, 9), 4, "own")

    lookup.extend([21, 9])
    assert lookup.propose(2) == Proposal((1, 2), 6, "own")


def test_a_place_is_left_when_something_else_comes():
    lookup = Lookup([1, 2, 3, 10, 11, 12, 13, 14, 1, 2, 3, 20, 21, 9, 1, 2, 3])
    lookup.propose(2)

    lookup.extend([10])
    assert lookup.propose(2) == Proposal((11, 12), 4, "own")

    lookup.extend([99])
    assert lookup.propose(2) is None


def test_a_text_that_repeats_itself_is_carried_on_as_long_as_wanted():
    lookup = Lookup([5, 6, 7, 8] * 3)

    proposal = lookup.propose(10)

    assert proposal is not None
    assert proposal.tokens == (5, 6, 7, 8, 5, 6, 7, 8, 5, 6)


def test_a_short_match_near_the_end_is_no_reason_to_go_round():
    proposal = Lookup([1, 2, 3, 40, 41, 1, 2, 3]).propose(10)

    assert proposal == Proposal((40, 41, 1, 2, 3), 3, "own")


def test_nothing_is_proposed_where_nothing_is_wanted():
    assert Lookup([5, 6, 7, 8] * 3).propose(0) is None


def test_the_same_prompt_finds_its_answer_before_the_first_token():
    prompt, answer = [*range(100, 150), 7, 8, 9], list(range(500, 540))
    memory = Memory(1000)
    memory.remember("me", prompt + answer, len(prompt))
    lookup = Lookup(prompt, memory, "me")

    for at in range(0, 40, 5):
        proposal = lookup.propose(5)
        assert proposal == Proposal(tuple(answer[at : at + 5]), len(prompt) + at, "memory")
        lookup.extend(answer[at : at + 5])
    assert lookup.propose(5) is None


def test_an_answer_that_differs_in_a_token_is_found_again_after_a_few():
    prompt, answer = list(range(20)), list(range(500, 540))
    memory = Memory(1000)
    memory.remember("me", prompt + answer, len(prompt))
    lookup = Lookup(prompt, memory, "me")
    lookup.extend(answer[:10])
    lookup.extend([3000])
    assert lookup.propose(5) is None

    lookup.extend(answer[11:15])

    assert lookup.propose(3) == Proposal(tuple(answer[15:18]), 4, "memory")


def test_the_longer_match_wins_between_the_text_and_the_memory():
    memory = Memory(1000)
    memory.remember("me", [50, 1, 2, 3, 4, 5, 60, 61, 62], 1)

    shorter_here = Lookup([3, 4, 5, 70, 71, 1, 2, 3, 4, 5], memory, "me").propose(2)
    as_long_here = Lookup([1, 2, 3, 4, 5, 70, 71, 1, 2, 3, 4, 5], memory, "me").propose(2)

    assert shorter_here == Proposal((60, 61), 5, "memory")
    assert as_long_here == Proposal((70, 71), 5, "own")


def test_the_memory_of_nobody_is_not_searched():
    memory = Memory(1000)
    memory.remember("me", list(range(40)), 20)

    assert Lookup(range(20), memory, "").propose(5) is None
    assert Lookup(range(20), memory, "you").propose(5) is None
