"""Ids of events: what goes in comes out, and nothing that a client sends breaks anything."""

from base64 import urlsafe_b64encode
from contextlib import suppress
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.event_id import (
    Place,
    Told,
    decode_place,
    encode_place,
    fingerprint,
    fingerprint_of,
    hash_worker,
)

counts = st.integers(0, 2**31 - 1)
four = st.binary(min_size=4, max_size=4)


@st.composite
def places(draw):
    """A place, parts, choices each, and whether there are offsets."""
    parts, each, offsets = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.booleans())
    told = st.builds(
        Told,
        count=counts,
        check=st.integers(0, 2**32 - 1),
        begun=st.booleans(),
        whole=st.booleans(),
        done=st.booleans(),
        offset=counts if offsets else st.just(0),
    )
    choices = draw(st.lists(told, min_size=parts * each, max_size=parts * each))
    for choice in choices:
        choice.check = choice.check if choice.count else 0
    place = Place(
        draw(st.integers(0, 2**63 - 1)),
        draw(st.integers(0, 2**32 - 1)),
        draw(four),
        draw(st.lists(four, min_size=parts, max_size=parts)),
        choices,
        draw(st.booleans()),
    )
    return place, parts, each, offsets


@given(places())
def test_what_goes_in_comes_out(case):
    place, parts, each, offsets = case
    text = encode_place(place, offsets=offsets)

    assert decode_place(text, parts=parts, each=each, offsets=offsets) == place
    assert fingerprint_of(text) == place.fingerprint


@given(places(), st.integers(0, 200), st.binary(max_size=3))
def test_one_that_was_cut_or_added_to_is_none(case, at, more):
    place, parts, each, offsets = case
    text = encode_place(place, offsets=offsets)
    changed = text[:at] + more
    if changed == text:
        return
    try:
        read = decode_place(changed, parts=parts, each=each, offsets=offsets)
    except ValueError:
        return
    # Bits behind the last byte count for nothing, and what is another number is another place.
    assert len(read.choices) == len(place.choices)


@given(st.binary(max_size=200) | st.binary(max_size=80).map(urlsafe_b64encode))
def test_garbage_is_refused_with_a_value_error_or_read(text):
    for read in (fingerprint_of, partial(decode_place, parts=1, each=2, offsets=True)):
        with suppress(ValueError):
            read(text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "length"),
        (b"A" * 5000, "length"),
        (b"AAAAA", "length"),
        (b"AAA=", "characters"),
        (b"AA", "cut off"),
        (b"A" * 40, "version"),
        ("Aé".encode("latin-1"), "characters"),
    ],
)
def test_the_reason_is_told(text, why):
    with pytest.raises(ValueError, match=why):
        decode_place(text, parts=1, each=1, offsets=False)


def test_it_is_short():
    mark = fingerprint(b"{}", "me", "model")
    place = Place(2**62, 1_700_000_000, mark, [hash_worker("worker-1")], [Told(1000, 2**31)])
    assert len(encode_place(place, offsets=False)) == 36
    place.choices *= 8
    assert len(encode_place(place, offsets=False)) == 92


def test_request_owner_and_model_are_told_apart():
    marks = {
        fingerprint(body, owner, model)
        for body in (b"{}", b"[]")
        for owner in ("", "me")
        for model in ("a", "b")
    }
    assert len(marks) == 8
    assert hash_worker("") != hash_worker("worker-1")
