"""Text assembly: whole characters, stop strings across token borders, nothing lost."""

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from worker.engine.text import TextAssembler


def reference(text: str, stop: tuple[str, ...]) -> tuple[str, str]:
    """The definition, letter by letter: the first position at which a stop string is complete."""
    for end in range(1, len(text) + 1):
        ending = [s for s in stop if s and text[:end].endswith(s)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, ""


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    borders = [0, *sorted(c % (len(data) + 1) for c in cuts), len(data)]
    return [data[a:b] for a, b in pairwise(borders)]


def assemble(pieces: list[bytes], stop: tuple[str, ...]) -> tuple[list[str], TextAssembler]:
    assembler = TextAssembler(pieces, stop)
    out = []
    for token in range(len(pieces)):
        text, stopped = assembler.push(token)
        out.append(text)
        assert stopped == bool(assembler.stopped_by)
    out.append(assembler.flush())
    return out, assembler


SMALL = st.text(alphabet="ab€😀\n", max_size=24)
STOPS = st.lists(st.text(alphabet="ab€😀\n", min_size=1, max_size=5), max_size=4).map(tuple)


@given(SMALL, STOPS, st.lists(st.integers(0, 200), max_size=40))
@example("xabcd", ("abcd", "bc"), [1, 2, 3, 4])
@example("aab", ("ab",), [1, 2])
def test_any_split_gives_the_text_up_to_the_first_complete_stop(text, stop, cuts):
    out, assembler = assemble(split(text.encode(), cuts), stop)
    assert ("".join(out), assembler.stopped_by) == reference(text, stop)


@given(st.text(max_size=60), st.lists(st.integers(0, 400), max_size=80))
def test_characters_are_never_cut(text, cuts):
    out, _ = assemble(split(text.encode(), cuts), ())
    assert "".join(out) == text


@given(st.binary(max_size=40), STOPS, st.lists(st.integers(0, 60), max_size=40))
def test_invalid_bytes_are_replaced_as_in_one_piece(data, stop, cuts):
    out, assembler = assemble(split(data, cuts), stop)
    assert ("".join(out), assembler.stopped_by) == reference(data.decode(errors="replace"), stop)


def test_an_invalid_byte_is_told_as_soon_as_it_is_certain():
    assembler = TextAssembler([b"\xe2\x82", b"(", b"\xff"])
    assert assembler.push(0) == ("", False)
    assert assembler.push(1) == ("�(", False)
    assert assembler.push(2) == ("�", False)


def test_text_that_cannot_become_a_stop_string_is_sent_at_once():
    assembler = TextAssembler([b"Hello", b" wo", b"\nUs", b"er:", b" more"], ("\nUser:",))
    assert assembler.push(0) == ("Hello", False)
    assert assembler.push(1) == (" wo", False)
    assert assembler.push(2) == ("", False)
    assert assembler.push(3) == ("", True)
    assert assembler.stopped_by == "\nUser:"
    assert assembler.push(4) == ("", True)
    assert assembler.flush() == ""


def test_an_incomplete_character_at_the_end_is_told_as_lost():
    assembler = TextAssembler(["€".encode()[:2]], ("stop",))
    assert assembler.push(0) == ("", False)
    assert assembler.flush() == "�"
    assert assembler.flush() == ""


@pytest.mark.parametrize("stop", [(), ("",), ("", "z")])
def test_an_empty_stop_string_stops_nothing(stop):
    out, assembler = assemble([b"ab", b"c"], stop)
    assert out == ["ab", "c", ""]
    assert assembler.stopped_by == ""
