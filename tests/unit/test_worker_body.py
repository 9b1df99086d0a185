"""Joining chunks: what arrives is what was sent, and what is held is bounded."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.protocol import Chunk
from worker.body import CHUNK_SECONDS, Bodies, BodyError, Full


def make(size: int, *, attempt: int = 1, expires: float = 1e9, most: int = 10**6) -> Bodies:
    bodies = Bodies(most_bytes=most, largest=10**6)
    bodies.begin(attempt, model="m", reply="r", size=size, now=0.0, expires=expires)
    return bodies


@given(data=st.binary(min_size=1, max_size=200), piece=st.integers(1, 50), doubles=st.data())
def test_whatever_is_cut_is_joined(data: bytes, piece: int, doubles: st.DataObject):
    bodies = make(len(data))
    pieces = [data[start : start + piece] for start in range(0, len(data), piece)]
    for index, part in enumerate(pieces):
        again = doubles.draw(st.integers(0, index))
        if index:
            assert bodies.add(Chunk(1, again - 1 if again else 0, pieces[0]), 0.0) is None
        body = bodies.add(Chunk(1, index, part), 0.0)
        assert (body is not None) == (index == len(pieces) - 1)
    assert body is not None
    assert bytes(body.data) == data
    assert (len(bodies), bodies.announced) == (0, 0)


@given(index=st.integers(1, 100))
def test_a_gap_is_an_error(index: int):
    with pytest.raises(BodyError, match="chunk 0"):
        make(10).add(Chunk(1, index, b"x"), 0.0)


def test_more_than_announced_is_an_error():
    with pytest.raises(BodyError, match="announced"):
        make(3).add(Chunk(1, 0, b"four"), 0.0)


def test_chunks_of_nobody_are_ignored():
    assert make(3).add(Chunk(2, 0, b"abc"), 0.0) is None


def test_each_body_and_all_together_are_bounded():
    bodies = Bodies(most_bytes=100, largest=80)
    with pytest.raises(BodyError, match="81 bytes; the limit is 80"):
        bodies.check(81)
    bodies.check(80)
    bodies.begin(1, model="m", reply="r", size=80, now=0.0, expires=9.0)
    with pytest.raises(Full):
        bodies.check(21)
    bodies.check(20)
    bodies.close(1)
    bodies.check(80)


def test_silence_and_deadline_end_a_body():
    bodies = make(10, attempt=1)
    bodies.begin(2, model="m", reply="r", size=10, now=0.0, expires=1.0)
    assert [(b.attempt, why) for b, why in bodies.expired(1.0)] == [(2, "deadline")]
    bodies.add(Chunk(1, 0, b"x"), CHUNK_SECONDS - 1)
    assert bodies.expired(CHUNK_SECONDS) == []
    assert [(b.attempt, why) for b, why in bodies.expired(3 * CHUNK_SECONDS)] == [(1, "silence")]
    assert bodies.announced == 0


def test_all_bodies_of_a_model_are_given_up_together():
    bodies = make(10)
    bodies.begin(2, model="other", reply="r", size=10, now=0.0, expires=9.0)
    bodies.close_model("m")
    assert 1 not in bodies
    assert 2 in bodies
    assert bodies.announced == 10
