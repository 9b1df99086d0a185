"""A client that has part of an answer is told the rest, of tokens kept or generated once more."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scripted_sequences import END, Setup, events, logits, plainly, setups, wanted

from shared.errors import CannotContinue
from shared.protocol import Delta, Done, Had, Sampling
from shared.token_check import extend_check
from worker.engine.quiet import Quiet

GREEDY = Sampling(1, temperature=0.0)


def told(frames, name):
    return [each for f in frames if isinstance(f, Delta) for each in getattr(f, name)]


def had_of(frames):
    """What a client has that was sent these frames."""
    tokens = told(frames, "tokens")
    tail = any(isinstance(f, Delta) and not f.tokens for f in frames)
    return Had(len(tokens), extend_check(0, tokens), whole=tail)


def go_on(sequence, rows, frames):
    for row in rows:
        if sequence.over is None:
            sequence.advance(row[None].copy(), [], frames)
    return frames


def check_rest(whole, had, rest):
    """The rest is told once, behind tokens that are told without anything else."""
    count = len(told(had, "tokens"))
    assert events(had + rest) == events(whole)
    assert told(rest, "tokens") == told(whole, "tokens")
    assert told(had + rest, "logprobs") == told(whole, "logprobs")
    seen = 0
    for frame in rest:
        if isinstance(frame, Delta):
            assert frame.first == seen
            seen += len(frame.tokens)
            if frame.first < count:
                assert seen <= count
                assert (frame.text, frame.logprobs, frame.tools, frame.reasoning) == (
                    "",
                    (),
                    (),
                    "",
                )


@given(setups, logits, st.integers(0, 24))
def test_what_is_generated_once_more_is_told_from_where_the_client_is(setup, rows, cut):
    _, whole, _ = plainly(setup, rows)
    assume(isinstance(whole[-1], Done))
    had = [f for f in whole if isinstance(f, Delta)][:cut]

    sequence = setup.sequence(Quiet(had_of(had)))
    rest = go_on(sequence, rows, [])

    check_rest(whole, had, rest)
    assert sequence.job.completion == whole[-1].count


@given(setups, logits, st.integers(0, 24), st.integers(0, 24), st.booleans())
def test_what_was_kept_is_told_from_where_the_client_is(setup, rows, cut, more, ended):
    plain, whole, _ = plainly(setup, rows)
    assume(isinstance(whole[-1], Done))
    deltas = [f for f in whole if isinstance(f, Delta)]
    had = deltas[:cut]
    count, tokens = len(told(had, "tokens")), told(whole, "tokens")
    # Log probabilities are not kept: what is behind the client is generated once more.
    kept = tokens[: count if setup.request.logprobs is not None else count + more]
    over = plain.over if ended and len(kept) == len(tokens) else None

    sequence, rest = setup.sequence(Quiet(had_of(had))), []
    sequence.recall(kept, over, rest)
    assert sequence.tokens == [1, 2, *kept]
    assert told(rest, "tokens") == kept
    if sequence.over is None:
        go_on(sequence, rows[len(kept) :], rest)
    else:
        sequence.finish(rest)

    check_rest(whole, had, rest)
    assert sequence.job.completion == plain.job.completion


@given(setups, logits, st.integers(1, 24))
def test_another_answer_is_never_told_behind_what_the_client_has(setup, rows, cut):
    _, whole, _ = plainly(setup, rows)
    assume(isinstance(whole[-1], Done))
    had = had_of([f for f in whole if isinstance(f, Delta)][:cut])
    assume(had.count)

    sequence, rest = setup.sequence(Quiet(Had(had.count, had.check ^ 1, had.whole))), []
    with pytest.raises(CannotContinue):
        go_on(sequence, rows, rest)
    assert events(rest) == []


@pytest.mark.parametrize(
    ("says", "had"),
    [
        # it ends before
        ((1, END), Had(2, extend_check(0, (1, 2)))),
        # it does not end where it did
        ((1, 2), Had(1, extend_check(0, (1,)), whole=True)),
    ],
)
def test_an_end_in_another_place_is_no_end(says, had):
    sequence = Setup(GREEDY).sequence(Quiet(had))
    with pytest.raises(CannotContinue):
        go_on(sequence, wanted(*says), [])


def test_a_draft_that_reaches_behind_what_the_client_has_is_told_in_two_frames():
    sequence, frames = Setup(GREEDY).sequence(Quiet(Had(2, extend_check(0, (1, 2))))), []
    sequence.advance(wanted(1, 2, 3), [1, 2], frames)

    assert frames == [Delta(1, 0, 0, (1, 2)), Delta(1, 0, 2, (3,), " c")]
