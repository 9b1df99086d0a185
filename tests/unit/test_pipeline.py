"""What stages send each other: messages survive, no bytes do harm, rows keep their order."""

from contextlib import suppress

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from shared.pipeline import (
    Broken,
    Copy,
    Forget,
    Hello,
    Pass,
    StageMessage,
    Swap,
    decode_message,
    encode_message,
)
from worker.engine.activations import from_bytes, passes, to_bytes

slot = st.integers(0, 511)
count = st.integers(0, 2**40)
group = st.text("abc-019", min_size=1, max_size=64)
operation = st.one_of(
    st.builds(Forget, slot, count), st.builds(Copy, slot, slot), st.builds(Swap, slot, slot)
)
message = st.one_of(
    st.builds(Hello, group, count, count, count, st.lists(st.text(), max_size=3).map(tuple), count),
    st.builds(
        Pass,
        group=group,
        number=count,
        first=slot,
        starts=st.lists(count, min_size=1, max_size=9).map(tuple),
        each=st.integers(1, 600),
        half=st.booleans(),
        operations=st.lists(operation, max_size=4).map(tuple),
    ),
    st.builds(Broken, group, st.text(), st.text()),
)


@given(message, st.binary(max_size=200))
def test_a_message_survives(head: StageMessage, rows: bytes):
    got, data = decode_message(encode_message(head, rows))
    assert got == head
    assert bytes(data) == rows


@given(st.binary(max_size=80))
def test_no_bytes_do_harm(data: bytes):
    with suppress(msgspec.DecodeError):
        decode_message(data)


@given(message, st.data())
def test_a_message_that_was_cut_is_none(head: StageMessage, draw: st.DataObject):
    whole = encode_message(head)
    cut = whole[: draw.draw(st.integers(0, len(whole) - 1))]
    with pytest.raises(msgspec.DecodeError):
        decode_message(cut)


numbers = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 8)),
    elements=st.floats(-1e6, 1e6, width=32),
)


@given(numbers, st.booleans())
def test_rows_survive_as_far_as_their_bits_go(rows: np.ndarray, half: bool):
    data = memoryview(to_bytes(rows, half=half))
    got = from_bytes(data, *rows.shape, half=half)
    assert len(data) == rows.size * (2 if half else 4)
    if half:
        # 11 bits of precision, and 65504 at most; below 2**-14 numbers lie 2**-24 apart.
        np.testing.assert_allclose(got, np.clip(rows, -65504, 65504), rtol=2**-11, atol=2**-25)
    else:
        np.testing.assert_array_equal(got, rows)
    with pytest.raises(ValueError, match="wanted"):
        from_bytes(data[:-1], *rows.shape, half=half)


steps = st.lists(
    st.tuples(st.integers(1, 3), st.integers(1, 70)), min_size=0, max_size=12
)  # gap to the slot before, rows


@given(steps, st.integers(1, 64), st.integers(1, 5))
def test_passes_have_all_rows_once_and_are_what_llama_cpp_computes_in_one_go(
    step: list[tuple[int, int]], most: int, wanted: int
):
    slots: list[int] = []
    at = -1
    for gap, rows in step:
        at += gap
        slots += [at] * rows
    spans = passes(slots, most=most, wanted=wanted)
    ends = [0, *(span.stop for span in spans)]
    assert [span.start for span in spans] == ends[:-1]
    assert ends[-1] == len(slots)
    for span in spans:
        part = slots[span.start : span.stop]
        assert 0 < len(part) <= most
        assert part == [part[0] + row // span.each for row in range(len(part))]


def test_sequences_that_decode_are_shared_among_the_stages():
    assert [span.stop for span in passes(range(8), most=64, wanted=2)] == [4, 8]
    assert [span.stop for span in passes(range(7), most=64, wanted=3)] == [3, 6, 7]
    assert [span.stop for span in passes([3], most=64, wanted=3)] == [1]
    assert passes([], most=64, wanted=3) == []


def test_a_prompt_beside_sequences_that_decode():
    slots = [0, 1, *[2] * 5, 3]
    assert [(s.start, s.stop, s.each) for s in passes(slots, most=3, wanted=1)] == [
        (0, 2, 1),
        (2, 5, 3),
        (5, 7, 2),
        (7, 8, 1),
    ]


@pytest.mark.parametrize(("most", "wanted"), [(0, 1), (1, 0)])
def test_impossible_sizes_are_refused(most: int, wanted: int):
    with pytest.raises(ValueError, match="must be at least 1"):
        passes([1], most=most, wanted=wanted)
