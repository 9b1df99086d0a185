"""What is answered before an engine sees a request."""

from math import inf
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.protocol import (
    Busy,
    Embed,
    Fail,
    Generate,
    Request,
    Resumed,
    Sampling,
    TextInput,
    encode,
)
from worker.intake import VERSION_HEADER, Rejected, read_request, ticket_of

REQUEST = Generate("id", 5, "m", TextInput("x"), Sampling(seed=1), deadline=100.0)


def read(data: bytes, **changes: Any) -> Any:
    options = {"worker": "w", "names": ("m", "alias"), "now": 50.0} | changes
    headers = options.pop("headers", {VERSION_HEADER: "1"})
    return read_request(data, headers, **options)


def test_a_good_request_passes():
    assert read(encode(REQUEST)) == REQUEST
    alias = msgspec.structs.replace(REQUEST, model="alias")
    assert read(encode(alias), headers={VERSION_HEADER: "1.3"}) == alias


@pytest.mark.parametrize("headers", [None, {}, {VERSION_HEADER: "2"}, {VERSION_HEADER: "x.1"}])
def test_another_version(headers: dict[str, str] | None):
    rejected = read(encode(REQUEST), headers=headers)
    assert isinstance(rejected.answer, Fail)
    assert (rejected.answer.attempt, rejected.answer.code) == (5, "unavailable")
    assert rejected.answer.retry_after == 1


def test_the_wrong_model():
    rejected = read(encode(REQUEST), names=("other",))
    assert rejected.answer == Busy(5, "w", reason="unknown_model")


@pytest.mark.parametrize(("now", "passes"), [(99.9, True), (100.0, False), (1e9, False)])
def test_deadlines(now: float, passes: bool):
    read_one = read(encode(REQUEST), now=now)
    assert (read_one == REQUEST) == passes
    if not passes:
        assert read_one.answer.code == "deadline_exceeded"


def test_a_malformed_request_with_an_attempt():
    raw = msgspec.msgpack.decode(encode(REQUEST)) | {"n": "many"}
    rejected = read(encode(raw))
    assert isinstance(rejected.answer, Fail)
    assert (rejected.answer.attempt, rejected.answer.code) == (5, "invalid_value")
    assert "$.n" in rejected.answer.message


@given(st.binary(max_size=60))
def test_no_bytes_do_harm(data: bytes):
    for headers in ({VERSION_HEADER: "1"}, {}):
        assert isinstance(read(data, headers=headers), Rejected)


def test_a_ticket_weighs_what_is_to_be_done():
    def weight(request: Request) -> int:
        return ticket_of(request, "reply", 0.0).weight

    assert weight(REQUEST) == 1
    assert weight(msgspec.structs.replace(REQUEST, n=4)) == 4
    assert weight(msgspec.structs.replace(REQUEST, n=-3)) == 1
    resumed = (Resumed((1,)), Resumed(done=3), Resumed())
    assert weight(msgspec.structs.replace(REQUEST, n=3, resume=resumed)) == 2
    assert weight(msgspec.structs.replace(REQUEST, resume=(Resumed(done=3),))) == 1
    assert weight(Embed("id", 5, "m", (TextInput("a"), TextInput("b")), 1.0)) == 1


def test_a_ticket_knows_the_deadline_unless_somebody_is_reading_already():
    asked = msgspec.structs.replace(REQUEST, max_tokens=7, owner="o", priority="batch")
    ticket = ticket_of(asked, "reply", -40.0)
    assert (ticket.deadline, ticket.tokens, ticket.owner, ticket.priority) == (
        60.0,
        7,
        "o",
        "batch",
    )
    resumed = msgspec.structs.replace(REQUEST, resume=(Resumed((1,)),))
    assert ticket_of(resumed, "reply", -40.0).deadline == inf
    assert ticket_of(Embed("id", 5, "m", (TextInput("a"),), 100.0), "r", 1.0).deadline == 101.0
