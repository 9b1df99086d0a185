"""A sequence that goes on after tokens told before tells the rest, without a gap or a double."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scripted_sequences import END, SIZE, Setup, events, logits, plainly, setups, wanted

from shared.errors import InvalidRequest
from shared.protocol import Delta, Done, Sampling

GREEDY = Sampling(1, temperature=0.0)


def told(frames, name):
    return [each for f in frames if isinstance(f, Delta) for each in getattr(f, name)]


def go_on(sequence, rows, frames):
    for row in rows:
        if sequence.advance(row[None].copy(), [], frames).complete:
            return


@given(setups, logits, st.integers(0, 24))
def test_replayed_tokens_and_the_rest_are_told_once(setup, rows, cut):
    plain, whole, sampled = plainly(setup, rows)
    assume(isinstance(whole[-1], Done))
    tokens = [token for token in sampled if token != END or setup.request.sampling.ignore_eos]
    # what the router had: frames up to one, in which no token's text is missing
    had = [f for f in whole if isinstance(f, Delta) and f.tokens][:cut]
    count = len(told(had, "tokens"))

    sequence, rest = setup.sequence(), []
    sequence.replay(told(had, "tokens"))
    assert sequence.count == sequence.job.completion == count
    assert sequence.tokens == [1, 2, *tokens[:count]]
    if sequence.over is None:
        go_on(sequence, rows[count:], rest)
    else:
        sequence.finish(rest)

    assert events(had + rest) == events(whole)
    assert told(had + rest, "tokens") == told(whole, "tokens")
    assert told(had + rest, "logprobs") == told(whole, "logprobs")
    deltas = [f for f in rest if isinstance(f, Delta)]
    assert not deltas or deltas[0].first == count
    assert sequence.job.completion == plain.job.completion


@pytest.mark.parametrize(
    ("setup", "tokens", "done"),
    [
        (Setup(GREEDY, limit=2), (1, 2), Done(1, 0, 2, "length")),
        (Setup(GREEDY, stop=("ab",)), (3, 1, 2), Done(1, 0, 3, "stop", "ab")),
        (Setup(GREEDY, matched=2), (1, 2), Done(1, 0, 2, "stop")),
        # a smaller context than the earlier worker's
        (Setup(GREEDY, limit=2), (1, 2, 3), Done(1, 0, 3, "length")),
    ],
)
def test_where_nothing_is_left_to_sample_the_end_is_told(setup, tokens, done):
    sequence, frames = setup.sequence(), []
    sequence.replay(tokens)
    sequence.finish(frames)

    assert frames == [done]


def test_text_that_a_stop_string_held_back_comes_at_the_end():
    sequence, frames = Setup(GREEDY, limit=2, stop=("b c",)).sequence(), []
    sequence.replay((1, 2))
    sequence.finish(frames)

    assert frames == [Delta(1, 0, 2, (), "b"), Done(1, 0, 2, "length")]


def test_half_a_character_is_completed():
    sequence, frames = Setup(GREEDY).sequence(), []
    sequence.replay((1, 8))
    sequence.advance(wanted(9), [], frames)

    assert frames == [Delta(1, 0, 2, (9,), "\N{EURO SIGN}")]


def test_a_call_goes_on_under_its_id():
    setup = Setup(GREEDY, tools=True, limit=99)
    says = (5, 7, 6, 5, 7, 6)
    whole, first, rest = setup.sequence(), [], []
    go_on(whole, wanted(*says), first)

    sequence = setup.sequence()
    sequence.replay(says[:3])
    go_on(sequence, wanted(*says[3:]), rest)

    (call,) = [d for d in told(rest, "tools") if d.id]
    assert (call.index, call.id) == (1, [d.id for d in told(first, "tools") if d.id][1])


@pytest.mark.parametrize(
    ("setup", "tokens"),
    [
        (Setup(GREEDY), (1, SIZE)),
        (Setup(GREEDY), (-1,)),
        (Setup(GREEDY, matched=5), (1, 1)),
        (Setup(GREEDY, matched=1), (1, 2)),
        (Setup(GREEDY, stop=("ab",)), (1, 2, 3)),
    ],
)
def test_what_cannot_have_been_sampled_is_refused(setup, tokens):
    with pytest.raises(InvalidRequest, match="cannot have been sampled") as caught:
        setup.sequence().replay(tokens)
    assert caught.value.param == "resume"
