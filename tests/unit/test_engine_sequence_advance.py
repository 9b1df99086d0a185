"""A sequence that advances by drafts tells what it tells token by token."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scripted_sequences import END, SIZE, Setup, events, logits, plainly, setups, wanted

from shared.protocol import Delta, Done, Sampling
from worker.engine.sampling import confidence
from worker.engine.sequence import NoTokenLeft


@given(setups, logits, st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), min_size=24))
def test_with_drafts_all_is_told_as_without(setup, rows, drafts):
    plain, told, sampled = plainly(setup, rows)
    assume(isinstance(told[-1], Done))

    sequence, frames, at = setup.sequence(), [], 0
    for length, wrong in drafts:
        # right up to a place, and after the end anything
        draft = (sampled[at : at + length] + [1] * length)[:length]
        if wrong < length:
            draft[wrong] = (draft[wrong] + 1) % SIZE
        advance = sequence.advance(rows[at : at + 1 + length].copy(), draft, frames)

        coming = sampled[at:]
        agreed = 0
        while agreed < min(length, len(coming) - 1) and draft[agreed] == coming[agreed]:
            agreed += 1
        assert advance.rows == agreed + 1
        assert advance.tokens == [t for t in coming[: agreed + 1] if t != END or len(coming) == 0]
        at += advance.rows
        assert advance.complete == (at == len(sampled))
        if advance.complete:
            break

    assert advance.complete
    assert events(frames) == events(told)
    assert sequence.count == plain.count == sequence.job.completion
    for name in ("tokens", "logprobs"):
        one, other = (
            [each for frame in all_of if isinstance(frame, Delta) for each in getattr(frame, name)]
            for all_of in (frames, told)
        )
        assert one == other
    count = 0
    for frame in frames:
        if isinstance(frame, Delta):
            assert frame.first == count
            count += len(frame.tokens)
    assert frames[-1].count == count
    assert len(frames) <= len(told)


def advance(setup, says, draft):
    frames = []
    return setup.sequence().advance(wanted(*says), list(draft), frames), frames


GREEDY = Sampling(1, temperature=0.0)


def test_tokens_of_a_step_are_told_in_one_frame():
    done, frames = advance(Setup(GREEDY), (1, 2, 3, 1), (1, 2, 3))

    assert done == ([1, 2, 3, 1], False, 4)
    assert frames == [Delta(1, 0, 0, (1, 2, 3, 1), "ab ca")]


def test_nothing_counts_behind_the_first_draft_token_that_is_wrong():
    done, frames = advance(Setup(GREEDY), (1, 2, 3, 1), (1, 3, 3))

    assert done == ([1, 2], False, 2)
    assert frames == [Delta(1, 0, 0, (1, 2), "ab")]


@pytest.mark.parametrize(
    ("setup", "says", "tokens", "rows", "done"),
    [
        (Setup(GREEDY), (1, END, 2, 2), [1], 2, Done(1, 0, 1, "stop")),
        (Setup(GREEDY, stop=("ab",)), (3, 1, 2, 2), [3, 1, 2], 3, Done(1, 0, 3, "stop", "ab")),
        (Setup(GREEDY, limit=2), (1, 2, 2, 2), [1, 2], 2, Done(1, 0, 2, "length")),
        (Setup(GREEDY, matched=3), (1, 2, 3, 2), [1, 2, 3], 3, Done(1, 0, 3, "stop")),
    ],
)
def test_what_ends_the_answer_ends_it_inside_a_draft(setup, says, tokens, rows, done):
    result, frames = advance(setup, says, says[:-1])

    assert result == (tokens, True, rows)
    assert frames[-1] == done


def test_thought_then_text_then_call_share_a_frame_and_any_other_order_does_not():
    setup = Setup(GREEDY, tools=True, thinks=True, limit=99)
    says = (1, 4, 2, 5, 7, 6, 3, 5, 7, 6)

    _, frames = advance(setup, says, says[:-1])

    told = [(f.reasoning, f.text.strip(), len({d.index for d in f.tools})) for f in frames]
    assert told == [("a", "b", 1), ("", "c", 1)]
    assert [f.first for f in frames] == [0, 6]


def test_rows_must_be_one_more_than_draft_tokens():
    with pytest.raises(ValueError, match="row more than the draft"):
        Setup(GREEDY).sequence().advance(wanted(1, 2), [1, 2], [])


def test_no_token_left_is_an_error():
    rows = wanted(1, 2)
    rows[1] = -math.inf

    with pytest.raises(NoTokenLeft):
        Setup(GREEDY).sequence().advance(rows, [1], [])


# guesses


@given(
    st.integers(0, 99),
    st.sampled_from([0.0, 0.7, 1.5]),
    st.none() | st.integers(1, 8),
    logits,
)
def test_guesses_from_the_models_own_logits_are_what_it_samples(seed, temperature, matched, rows):
    sampling = Sampling(seed, temperature=temperature, ignore_eos=True)
    setup = Setup(sampling, limit=99, matched=matched)
    _, _, sampled = plainly(setup, rows)

    guesser = setup.sequence().guesser()
    guesses = [guesser.guess(row) for row in rows.copy()]

    assert [token for token, _ in guesses[: len(sampled)]] == sampled
    assert all(0 < sure <= 1 for _, sure in guesses[: len(sampled)])
    # behind the end of what the constraint allows nothing is worth a row
    assert all(guess == (0, 0.0) for guess in guesses[len(sampled) :])


def test_a_guess_leaves_the_sequence_as_it_was():
    setup = Setup(Sampling(3, repeat_penalty=1.3), matched=5)
    rows = wanted(1, 2, 3)
    sequence, untouched = setup.sequence(), setup.sequence()
    guesser = sequence.guesser()
    for row in rows:
        guesser.guess(row.copy())

    one, other = [], []
    assert sequence.advance(rows.copy(), [1, 2], one) == untouched.advance(
        rows.copy(), [1, 2], other
    )
    assert one == other


def test_where_no_token_may_follow_a_guess_is_not_sure():
    guesser = Setup(GREEDY).sequence().guesser()

    assert guesser.guess(np.full(SIZE, -np.inf, np.float32))[1] == 0.0
    assert guesser.guess(wanted(1)[0]) == (0, 0.0)


# how sure


@given(
    arrays(np.float32, 20, elements=st.floats(-20, 20, width=32)),
    st.integers(0, 19),
    st.floats(0.1, 2),
)
def test_confidence_is_the_probability_at_the_temperature(row, token, temperature):
    exact = np.exp((row.astype(np.float64) - row.max()) / temperature)
    expected = exact[token] / exact.sum()

    assert confidence(row, token, temperature) == pytest.approx(expected, rel=1e-3, abs=1e-20)


@pytest.mark.filterwarnings("error")
def test_confidence_does_not_overflow():
    row = np.array([-1e4, 1e4, -np.inf], np.float32)

    assert 0 <= confidence(row, 0, 0.1) < 1e-20
    assert confidence(row, 1, 0.1) == 1.0
