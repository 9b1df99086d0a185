"""Sizes in bytes as people write and read them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2 * 2**30),
        ("1.5 gb", 1_500_000_000),
        ("512M", 512_000_000),
        ("512mib", 512 * 2**20),
        ("64KiB", 65536),
        ("4096", 4096),
        ("1TiB", 2**40),
    ],
)
def test_sizes(text: str, size: int):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "two", "2 XB", "-1GiB", "0", "1e9", "GiB", "2GiBs", "nan"])
def test_what_is_no_size(text: str):
    with pytest.raises(ValueError, match="is no size"):
        parse_size(text)


@given(st.integers(0, 2**50))
def test_formatted_sizes_can_be_read(size: int):
    if size:
        assert parse_size(format_size(size)) == pytest.approx(size, rel=0.1)
