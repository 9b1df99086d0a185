"""Sizes in bytes, as people write and read them."""

import re

__all__ = ("format_size", "parse_size")

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"\s*(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>(?:[kmgt]i?)?)b?\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Read `2GiB`, `512M`, `1.5 gb` or plain bytes.

    Raises:
        ValueError: it is no size, or none above zero.
    """
    match = _SIZE.fullmatch(text)
    if match is not None:
        unit = match["unit"].lower()
        size = int(float(match["number"]) * (_UNITS.get(unit) or _BINARY[unit]))
        if size > 0:
            return size
    raise ValueError(f"{text!r} is no size; wanted for example 2GiB or 512M")


def format_size(size: int) -> str:
    """A size as people read it."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"
