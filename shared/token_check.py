"""A short check of token ids, by which two parts of the mesh see that they speak of the same ones.

CRC-32 over the ids as little-endian 32-bit numbers. It can be carried on token by token, and tells
answers apart that differ by chance; nobody is kept from making one up.
"""

import struct
from collections.abc import Sequence
from zlib import crc32

__all__ = ("extend_check",)

_one = struct.Struct("<i").pack


def extend_check(check: int, tokens: Sequence[int]) -> int:
    """Carry the check of some tokens on over those that follow; the check of no tokens is 0."""
    if len(tokens) == 1:
        return crc32(_one(tokens[0]), check)
    return crc32(struct.pack(f"<{len(tokens)}i", *tokens), check)
