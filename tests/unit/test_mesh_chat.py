import io
import json
from collections.abc import Iterator

import httpx
import pytest

from mesh.chat import Chat, Manner, answer_pieces, converse, first_model
from mesh.errors import CommandError


def event(**delta: object) -> str:
    return "data: " + json.dumps({"choices": [{"index": 0, "delta": delta}]})


def test_pieces_are_the_content_of_a_stream() -> None:
    lines = [
        event(role="assistant", content=""),
        "",
        ": ping",
        event(content="Hel"),
        event(content="lo"),
        'data: {"choices": [], "usage": {"total_tokens": 3}}',
        "data: [DONE]",
        event(content="never"),
    ]
    assert list(answer_pieces(iter(lines))) == ["Hel", "lo"]


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        ('data: {"error": {"message": "the worker was lost", "code": "worker_failed"}}', "lost"),
        ("data: {", "not an OpenAI chat stream"),
        (": ping", "ended before the answer did"),
    ],
)
def test_a_stream_that_fails_says_so_after_what_came(last: str, reason: str) -> None:
    pieces = answer_pieces(iter([event(content="Hel"), last]))
    assert next(pieces) == "Hel"
    with pytest.raises(CommandError, match=reason):
        next(pieces)


class Endpoint:
    """Answers every turn with `answers` in order, and keeps what it was sent."""

    def __init__(self, *answers: str | httpx.Response) -> None:
        self.answers: Iterator[str | httpx.Response] = iter(answers)
        self.sent: list[list[tuple[str, str]]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "first"}, {"id": "second"}]})
        body = json.loads(request.content)
        assert body["stream"] is True
        self.sent.append([(turn["role"], turn["content"]) for turn in body["messages"]])
        answer = next(self.answers)
        if isinstance(answer, httpx.Response):
            return answer
        lines = [event(content=word) for word in answer.split(" ")] + ["data: [DONE]"]
        return httpx.Response(200, text="\n\n".join(lines))

    def client(self) -> httpx.Client:
        return httpx.Client(base_url="http://mesh/v1", transport=httpx.MockTransport(self))


def test_each_turn_carries_the_conversation() -> None:
    endpoint = Endpoint("one", "two")
    with endpoint.client() as client:
        chat = Chat(client, "m", Manner(system="be brief"))
        assert "".join(chat.say("a")) == "one"
        assert "".join(chat.say("b")) == "two"
    assert endpoint.sent[1] == [
        ("system", "be brief"),
        ("user", "a"),
        ("assistant", "one"),
        ("user", "b"),
    ]


def test_a_turn_that_fails_is_not_part_of_the_conversation() -> None:
    refusal = httpx.Response(404, json={"error": {"message": "no model 'm'"}})
    endpoint = Endpoint(refusal, httpx.Response(502, text="<html>"), "fine")
    with endpoint.client() as client:
        chat = Chat(client, "m")
        with pytest.raises(CommandError, match="no model 'm'"):
            list(chat.say("a"))
        with pytest.raises(CommandError, match="answered 502"):
            list(chat.say("b"))
        list(chat.say("c"))
    assert endpoint.sent[-1] == [("user", "c")]


def test_an_answer_that_is_stopped_stays_as_far_as_it_came() -> None:
    endpoint = Endpoint("one two three", "four")
    with endpoint.client() as client:
        chat = Chat(client, "m")
        pieces = chat.say("a")
        next(pieces)
        with pytest.raises(KeyboardInterrupt):
            pieces.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
        list(chat.say("b"))
    assert endpoint.sent[1] == [("user", "a"), ("assistant", "one"), ("user", "b")]


def test_the_first_model_is_the_default() -> None:
    with Endpoint().client() as client:
        assert first_model(client) == "first"


def test_nobody_there_is_one_line() -> None:
    with pytest.raises(CommandError, match="does not answer") as caught:
        converse("http://127.0.0.1:9/v1", None, Manner(), io.StringIO("hi"), io.StringIO())
    assert "\n" not in str(caught.value)
    with pytest.raises(CommandError):
        converse("not a url", "m", Manner(), io.StringIO("hi"), io.StringIO())


def test_empty_input_is_no_question() -> None:
    with pytest.raises(CommandError, match="empty"):
        converse("http://127.0.0.1:9/v1", "m", Manner(), io.StringIO(" \n"), io.StringIO())
