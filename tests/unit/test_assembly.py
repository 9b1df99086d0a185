"""A valid answer is perturbed in every way a network can; the assembly must never be fooled."""

import random
from collections import defaultdict
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.assembly import Assembly
from shared.protocol import (
    Accepted,
    Busy,
    Delta,
    Done,
    Embed,
    EmbedResult,
    End,
    Fail,
    Frame,
    Generate,
    Had,
    Reading,
    Resumed,
    Sampling,
    TextInput,
    Timings,
    Usage,
)

ATTEMPT = 2**62 + 1
OTHER = 2**61 + 5
END = End(ATTEMPT, Usage(3, 4), Timings(0.0, 1.0, 2.0))


class Outcome(msgspec.Struct):
    tokens: dict[int, list[int]]
    gap: bool
    complete: bool
    tails: int = 0
    """How often text came without tokens."""


@st.composite
def answers(draw: Any) -> list[Frame]:
    """Frames of a whole answer: choices interleaved, each in pieces of one or more tokens."""
    choices = draw(st.integers(1, 3))
    streams: list[list[Frame]] = []
    for choice in range(choices):
        pieces = draw(st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=3), max_size=5))
        stream: list[Frame] = []
        count = 0
        for piece in pieces:
            stream.append(Delta(ATTEMPT, choice, count, tuple(piece)))
            count += len(piece)
        if draw(st.booleans()):
            stream.append(Delta(ATTEMPT, choice, count, (), "the end"))
        stream.append(Done(ATTEMPT, choice, count, "stop"))
        streams.append(stream)
    order = [choice for choice, stream in enumerate(streams) for _ in stream]
    random.Random(draw(st.integers())).shuffle(order)
    middle = [streams[choice].pop(0) for choice in order]
    return [Accepted(ATTEMPT, "worker-1"), *middle, END]


@st.composite
def perturbed(draw: Any, frames: list[Frame]) -> list[Frame]:
    """Lose, double, delay and reorder frames, and mix in those of another attempt."""
    out = list(frames)
    for _ in range(draw(st.integers(0, 4))):
        if not out:
            break
        here = draw(st.integers(0, len(out) - 1))
        there = draw(st.integers(0, len(out)))
        match draw(st.sampled_from(["lose", "double", "move", "foreign"])):
            case "lose":
                del out[here]
            case "double":
                out.insert(there, out[here])
            case "move":
                frame = out.pop(here)
                out.insert(min(there, len(out)), frame)
            case "foreign":
                out.insert(there, msgspec.structs.replace(out[here], attempt=OTHER))
    return out


def tokens_of(frames: list[Frame]) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = defaultdict(list)
    for frame in frames:
        if isinstance(frame, Delta):
            tokens[frame.choice] += frame.tokens
    return {choice: found for choice, found in tokens.items() if found}


def tails_of(frames: list[Frame]) -> int:
    return sum(isinstance(frame, Delta) and not frame.tokens for frame in frames)


def choices_of(frames: list[Frame]) -> int:
    return sum(isinstance(frame, Done) for frame in frames)


def receive(frames: list[Frame], choices: int) -> Outcome:
    """What a router makes of the frames: it takes them in turn and gives up at a gap."""
    assembly = Assembly(ATTEMPT, choices)
    taken: list[Frame] = []
    for frame in frames:
        verdict = assembly.check(frame)
        if verdict == "gap":
            return Outcome(tokens_of(taken), True, False, tails_of(taken))
        if verdict == "take":
            taken.append(frame)
    complete = any(isinstance(frame, End) for frame in taken)
    assert complete == assembly.ended
    return Outcome(tokens_of(taken), False, complete, tails_of(taken))


@given(answers())
def test_an_undisturbed_answer_is_taken_whole(frames: list[Frame]) -> None:
    assert receive(frames, choices_of(frames)) == Outcome(
        tokens_of(frames), False, True, tails_of(frames)
    )


@given(st.data())
def test_a_disturbed_answer_is_whole_or_is_not_taken_for_whole(data: Any) -> None:
    frames = data.draw(answers())
    whole = tokens_of(frames)
    outcome = receive(data.draw(perturbed(frames)), choices_of(frames))
    if outcome.complete:
        assert outcome.tokens == whole
    # What was shown before a gap is right as far as it goes.
    for choice, tokens in outcome.tokens.items():
        assert tokens == whole[choice][: len(tokens)]


@given(st.data())
def test_a_lost_token_frame_is_always_noticed(data: Any) -> None:
    frames = data.draw(answers().filter(lambda frames: bool(tokens_of(frames))))
    deltas = [i for i, frame in enumerate(frames) if isinstance(frame, Delta) and frame.tokens]
    lost = data.draw(st.sampled_from(deltas))
    assert receive(frames[:lost] + frames[lost + 1 :], choices_of(frames)).gap


@given(st.data())
def test_doubled_frames_change_nothing(data: Any) -> None:
    frames = data.draw(answers())
    twice = [copy for frame in frames for copy in (frame, frame)]
    late = twice + data.draw(st.lists(st.sampled_from(frames)))
    assert receive(late, choices_of(frames)) == Outcome(
        tokens_of(frames), False, True, tails_of(frames)
    )


@given(answers())
def test_frames_of_another_attempt_are_dropped(frames: list[Frame]) -> None:
    foreign = [msgspec.structs.replace(frame, attempt=OTHER) for frame in frames]
    mixed = [copy for pair in zip(foreign, frames, strict=True) for copy in pair]
    assert receive(mixed, choices_of(frames)) == Outcome(
        tokens_of(frames), False, True, tails_of(frames)
    )


@pytest.mark.parametrize(
    "last",
    [
        Fail(ATTEMPT, "worker_failed", "the engine died"),
        Busy(ATTEMPT, "worker-1"),
        EmbedResult(ATTEMPT, (b"\0\0\0\0",), Usage(1, 0)),
    ],
)
def test_nothing_is_taken_after_a_last_frame(last: Frame) -> None:
    assembly = Assembly(ATTEMPT)
    assert assembly.check(last) == "take"
    assert assembly.ended
    assert assembly.check(Delta(ATTEMPT, 0, 0, (1,))) == "drop"
    assert assembly.check(last) == "drop"


def test_an_end_before_all_choices_are_done_is_a_gap() -> None:
    assembly = Assembly(ATTEMPT, choices=2)
    assert assembly.check(Done(ATTEMPT, 0, 0, "stop")) == "take"
    assert assembly.check(END) == "gap"
    assert not assembly.ended


def test_two_assemblies_share_nothing() -> None:
    one, other = Assembly(1), Assembly(2)
    one.check(Delta(1, 0, 0, (5,)))
    one.check(Done(1, 0, 1, "stop"))
    assert other.count == 0
    assert other.done == set()


@given(st.data())
def test_an_answer_that_goes_on_on_another_attempt_is_taken_once(data: Any) -> None:
    frames = data.draw(answers())
    choices = choices_of(frames)
    cut = data.draw(st.integers(0, len(frames)))
    assembly = Assembly(ATTEMPT, choices)
    taken = [frame for frame in frames[:cut] if assembly.check(frame) == "take"]
    before = tokens_of(taken)
    if assembly.ended:
        return
    resume = assembly.resume
    assert (resume == ()) == (not any(isinstance(f, Delta | Done) and _told(f) for f in taken))
    for choice, known in enumerate(resume):
        came = before.get(choice, [])
        assert known == (Resumed(done=len(came)) if known.done >= 0 else Resumed(tuple(came)))

    again = assembly.again(OTHER)
    # the worker goes on behind what came, and tells the text at the end anew
    late = data.draw(st.lists(st.sampled_from(frames)))
    for frame in [*late, *_rest(frames, before, again.done), *late]:
        assert again.check(frame) != "gap"

    assert again.ended
    assert {choice: list(tokens) for choice, tokens in enumerate(again.tokens) if tokens} == (
        tokens_of(frames)
    )


def _told(frame: Delta | Done) -> bool:
    return isinstance(frame, Done) or bool(frame.tokens)


def _rest(frames: list[Frame], before: dict[int, list[int]], done: set[int]) -> list[Frame]:
    """What another worker tells: all behind the tokens that came."""
    rest: list[Frame] = []
    for frame in frames:
        if isinstance(frame, Delta | Done) and frame.choice in done:
            continue
        came = before.get(frame.choice, []) if isinstance(frame, Delta) else []
        if isinstance(frame, Delta) and frame.tokens and frame.first < len(came):
            continue
        rest.append(msgspec.structs.replace(frame, attempt=OTHER))
    return rest


def test_the_text_at_the_end_comes_once_whatever_comes_twice() -> None:
    tail = Delta(ATTEMPT, 0, 1, (), "held back")
    assembly = Assembly(ATTEMPT)
    assert assembly.check(Delta(ATTEMPT, 0, 0, (7,))) == "take"
    assert assembly.check(tail) == "take"
    assert assembly.check(tail) == "drop"
    again = assembly.again(OTHER)
    assert again.check(msgspec.structs.replace(tail, attempt=OTHER)) == "drop"
    assert again.check(Done(OTHER, 0, 1, "stop")) == "take"


@pytest.mark.parametrize("choice", [-1, 2])
def test_a_choice_that_was_not_asked_for_is_a_gap(choice: int) -> None:
    assembly = Assembly(ATTEMPT, 2)
    assert assembly.check(Delta(ATTEMPT, choice, 0, (1,))) == "gap"
    assert assembly.check(Done(ATTEMPT, choice, 0, "stop")) == "gap"


def test_what_the_client_has_to_its_end_is_done() -> None:
    had = (Had(5, 1, done=True), Had(3, 2), Had(0, 0, done=True))
    request = Generate(
        "id", ATTEMPT, "m", TextInput("x"), Sampling(1), 0.0, n=3, reading=Reading(7, had)
    )
    assembly = Assembly.of(request)
    assert assembly.count == 0
    assert assembly.resume == (Resumed(done=5), Resumed(), Resumed(done=0))
    assert assembly.check(Delta(ATTEMPT, 0, 0, (1,))) == "drop"
    assert assembly.check(Delta(ATTEMPT, 1, 0, (8, 9))) == "take"
    again = assembly.again(OTHER)
    assert again.resume == (Resumed(done=5), Resumed((8, 9)), Resumed(done=0))
    assert again.check(Done(OTHER, 1, 2, "stop")) == "take"
    assert again.check(End(OTHER, Usage(1, 7), Timings(0, 0, 0))) == "take"


def test_a_request_that_begins_has_nothing_done() -> None:
    request = Generate("id", ATTEMPT, "m", TextInput("x"), Sampling(1), 0.0, n=2)
    assert Assembly.of(request) == Assembly(ATTEMPT, 2)
    readable = msgspec.structs.replace(request, reading=Reading(7))
    assert Assembly.of(readable) == Assembly(ATTEMPT, 2)
    embed = Embed("id", ATTEMPT, "m", (TextInput("x"),), 0.0)
    assert Assembly.of(embed) == Assembly(ATTEMPT)
