"""Streams cut behind any event and read on: every event comes once, whatever comes in between."""

import json
import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.dialects.chat_answer import ChatStream
from router.dialects.completions_answer import CompletionStream
from router.reading import ReadableStream, Reader, same_model
from shared.errors import CannotContinue, InvalidRequest
from shared.protocol import (
    Delta,
    Done,
    End,
    Generate,
    Sampling,
    TextInput,
    Timings,
    TokenLogprob,
    ToolDelta,
    Usage,
)

BODY = b'{"stream": true}'


class Answer(msgspec.Struct):
    """What a worker would say to one choice, token by token, and at its end."""

    tokens: list[tuple[int, str]]
    tail: str
    reason: str


class Asked(msgspec.Struct):
    """A request and the whole of its answer; by part and choice."""

    chat: bool
    usage: bool
    logprobs: bool
    echo: bool
    parts: int
    each: int
    answers: list[Answer]


@st.composite
def asked(draw):
    chat = draw(st.booleans())
    parts, each = 1 if chat else draw(st.integers(1, 3)), draw(st.integers(1, 3))
    logprobs = draw(st.booleans())
    answers = st.builds(
        Answer,
        st.lists(
            st.tuples(
                st.integers(0, 2**31 - 1), st.sampled_from(["", "a", "é\u2028", "\n\n", "x y"])
            ),
            max_size=6,
        ),
        st.sampled_from(["", "tail"]),
        st.sampled_from(["stop", "length"]),
    )
    return Asked(
        chat,
        draw(st.booleans()),
        logprobs,
        not chat and not logprobs and draw(st.booleans()),
        parts,
        each,
        draw(st.lists(answers, min_size=parts * each, max_size=parts * each)),
    )


def requests_of(case):
    sampling = Sampling(5, temperature=0.5)
    return [
        Generate("id", 1, "m", TextInput(f"p{part}"), sampling, 0.0, n=case.each, owner="me")
        for part in range(case.parts)
    ]


def stream_of(case, last=None):
    reader = Reader(last, BODY, requests_of(case), offsets=not case.chat and case.logprobs)
    if case.chat:
        inner = ChatStream("m", case.each, include_usage=case.usage, earlier=reader.earlier)
    else:
        prompts = ["echo" if case.echo else ""] * case.parts
        inner = CompletionStream(
            "m", case.each, prompts, include_usage=case.usage, earlier=reader.earlier
        )
    stream = ReadableStream(inner, reader, include_usage=case.usage)
    stream.worker_of = lambda part: f"worker-{part}"
    return stream, reader.requests(["worker-0", "worker-1"], seeded=False)


def frames_of(case, requests, chance):
    """What workers say, of all parts and choices in a random order, before the ends."""
    queues = []
    for part, request in enumerate(requests):
        had = request.reading.had
        for choice in range(case.each):
            answer = case.answers[part * case.each + choice]
            mine = had[choice] if had else None
            if mine is not None and mine.done:
                continue
            count = mine.count if mine else 0
            frames = []
            at = 0
            while at < count:
                size = chance.randint(1, count - at)
                tokens = tuple(token for token, _ in answer.tokens[at : at + size])
                frames.append(Delta(1, choice, at, tokens))
                at += size
            for index, (token, text) in enumerate(answer.tokens[count:], start=count):
                logprobs = (TokenLogprob(token, -1.0, text, b""),) if case.logprobs else ()
                tools = (ToolDelta(index, "id", "f", "{}"),) if case.chat and text == "x y" else ()
                frames.append(Delta(1, choice, index, (token,), text, logprobs, tools))
            if answer.tail and not (mine and mine.whole):
                frames.append(Delta(1, choice, len(answer.tokens), (), answer.tail))
            frames.append(Done(1, choice, len(answer.tokens), answer.reason))
            queues.append((part, frames))
    while queues:
        part, frames = queue = chance.choice(queues)
        yield part, frames.pop(0)
        if not frames:
            queues.remove(queue)


def said(case, stream, requests, chance):
    """The events of the whole stream, each with its id if it has one."""
    body = b""
    for part, frame in frames_of(case, requests, chance):
        body += stream.delta(part, frame) if isinstance(frame, Delta) else stream.done(part, frame)
    ends = [End(1, Usage(3, 4), Timings(1.0, 1.0, 1.0)) for _ in requests]
    body += stream.finish(ends)
    assert body.endswith(b"data: [DONE]\n\n")
    events = []
    for event in body.split(b"\n\n")[:-1]:
        *ids, data = event.split(b"\n")
        assert len(ids) <= 1
        events.append((ids[0].removeprefix(b"id: ") if ids else None, data.removeprefix(b"data: ")))
    return events


def read(events):
    """What a client makes of the events; asserts that nothing comes twice that comes once."""
    choices, chunks, usage, done = {}, set(), 0, 0
    for _, data in events:
        assert not done
        if data == b"[DONE]":
            done += 1
            continue
        chunk = json.loads(data)
        chunks.add((chunk["id"], chunk["created"], chunk["model"]))
        usage += chunk.get("usage") is not None
        for choice in chunk["choices"]:
            mine = choices.setdefault(choice["index"], ["", "", "", [], []])
            delta = choice.get("delta", {})
            assert mine[2] == ""
            mine[0] += choice.get("text") or delta.get("content") or ""
            if "role" in delta:
                assert mine[1] == ""
                mine[1] = delta["role"]
            mine[2] += choice["finish_reason"] or ""
            mine[3] += [piece["index"] for piece in delta.get("tool_calls", [])]
            logprobs = choice["logprobs"] or {}
            mine[4] += logprobs.get("text_offset") or [
                t["token"] for t in logprobs.get("content", [])
            ]
    assert len(chunks) <= 1
    return choices, chunks, usage, done


@given(asked(), st.lists(st.integers(0, 60), min_size=1, max_size=4), st.randoms())
def test_a_stream_that_is_cut_again_and_again_is_read_once(case, cuts, chance):
    stream, requests = stream_of(case)
    events = said(case, stream, requests, chance)
    whole = read(events)
    assert whole[2:] == (int(case.usage), 1)
    assert [bool(event[0]) for event in events] == [True] * (len(events) - 1) + [False]
    got = []
    for cut in cuts:
        got += events[: cut % len(events)]
        ids = [event[0] for event in got]
        if not ids:
            continue
        stream, requests = stream_of(case, ids[-1])
        assert all(
            r.reading.key == first.reading.key for r, first in zip(requests, requests, strict=True)
        )
        events = said(case, stream, requests, chance)
    got += events

    assert read(got) == whole


@given(asked(), st.integers(0, 60), st.randoms())
def test_what_is_asked_again_is_the_same_answer(case, cut, chance):
    stream, first = stream_of(case)
    events = said(case, stream, first, chance)[:-1]
    last = events[cut % len(events)][0]
    _, again = stream_of(case, last)

    for one, other in zip(first, again, strict=True):
        assert one.reading.had == ()
        assert len(other.reading.had) == case.each
        assert one.reading.key == other.reading.key
        assert one.sampling == other.sampling
        assert one.sampling.seed != 5
        assert 0 <= one.sampling.seed < 2**63
    workers = {request.reading.worker for request in again}
    assert workers <= {"", "worker-0", "worker-1"}
    assert len({request.reading.key for request in again}) == case.parts


def fresh(owner="", model="m", body=BODY, last=None):
    request = Generate("id", 1, model, TextInput("p"), Sampling(5), 0.0, owner=owner)
    return Reader(last, body, [request])


def an_id(**who):
    reader = fresh(**who)
    stream = ReadableStream(
        ChatStream("m", 1, include_usage=False, earlier=reader.earlier),
        reader,
        include_usage=False,
    )
    (request,) = reader.requests([], seeded=True)
    assert request.sampling.seed == 5
    return stream.delta(0, Delta(1, 0, 0, (1,), "x")).split(b"\n")[0].removeprefix(b"id: ")


@pytest.mark.parametrize("other", [{"owner": "you"}, {"model": "n"}, {"body": b"{}"}])
def test_an_id_is_good_for_its_own_request_alone(other):
    last = an_id(owner="me")
    fresh(owner="me", last=last)
    with pytest.raises(InvalidRequest, match="of an answer to another request") as caught:
        fresh(**({"owner": "me"} | other), last=last)
    assert caught.value.param == "Last-Event-ID"


@pytest.mark.parametrize("last", [b"", b"17", b"=", "é".encode("latin-1"), b"A" * 36])
def test_what_is_no_id_is_refused_by_name(last):
    with pytest.raises(InvalidRequest, match="must be the id of an event") as caught:
        fresh(last=last)
    assert caught.value.param == "Last-Event-ID"


def test_the_model_that_answered_is_found_again():
    last = an_id(owner="me", model="b")
    assert same_model(last, BODY, "me", ["a", "b", "c"]) == "b"
    with pytest.raises(InvalidRequest, match="another request"):
        same_model(last, BODY, "me", ["a", "c"])
    with pytest.raises(InvalidRequest, match="must be the id"):
        same_model(b"?", BODY, "me", ["a"])


def cut_after(tokens):
    case = Asked(True, False, False, False, 1, 1, [Answer([(7, "a"), (8, "b")], "", "stop")])
    stream, requests = stream_of(case)
    events = said(case, stream, requests, random.Random(1))
    return case, events[tokens][0]


def test_a_worker_that_tells_the_beginning_again_is_not_believed():
    case, last = cut_after(2)
    stream, _ = stream_of(case, last)
    with pytest.raises(CannotContinue):
        stream.delta(0, Delta(1, 0, 0, (7,), "a"))


def test_a_worker_that_goes_on_with_other_tokens_is_not_believed():
    case, last = cut_after(2)
    stream, _ = stream_of(case, last)
    assert stream.delta(0, Delta(1, 0, 0, (7,))) == b""
    with pytest.raises(CannotContinue):
        stream.delta(0, Delta(1, 0, 1, (9,)))
