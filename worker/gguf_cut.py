"""Putting a GGUF together from ranges of others: what stage files and shards share. Pure."""

import hashlib
import struct
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from worker.gguf_file import STRING, GgufFile, Tensor

__all__ = ("Cut", "NewTensor", "Piece", "Range", "alignment_of", "assemble", "number", "word")

FORMAT = 2
"""Of what is made here; part of a file's name."""

_VERSION = 3
_U32_KIND = 4


class Range(NamedTuple):
    """Bytes of one of the model's files; part -1: so many zeros."""

    part: int
    offset: int
    size: int


class NewTensor(NamedTuple):
    """A tensor of the new file; its size is that of its ranges."""

    name: str
    shape: tuple[int, ...]
    kind: int
    ranges: tuple[Range, ...]

    @classmethod
    def of(cls, tensor: Tensor, part: int, name: str = "") -> "NewTensor":
        """A whole tensor of the model, under a new name if one is given."""
        return cls(
            name or tensor.name,
            tensor.shape,
            tensor.kind,
            (Range(part, tensor.offset, tensor.size),),
        )

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(one.size for one in self.ranges)


class Piece(msgspec.Struct, frozen=True):
    """A range of bytes of one part of the model, and where it goes; part -1: zeros."""

    part: int
    offset: int
    size: int
    target: int
    """Bytes from the beginning of the new file."""


class Cut(msgspec.Struct, frozen=True):
    """A new file: its beginning, then its tensors."""

    header: bytes
    """Filled up to where the tensors begin."""
    pieces: tuple[Piece, ...]
    """In the order of their places, which do not overlap; between them are zeros."""
    size: int
    digest: str
    """Names all that made it: header and ranges, and the identity of the model's files."""

    @property
    def fetched(self) -> int:
        """Bytes that are taken from the model's files."""
        return sum(piece.size for piece in self.pieces if piece.part >= 0)


def alignment_of(file: GgufFile) -> int:
    """Bytes to a multiple of which a file's tensors are placed."""
    told = file.values.get("general.alignment")
    return told if isinstance(told, int) and told > 0 else 32


def assemble(
    parts: Sequence[GgufFile],
    pairs: Sequence[bytes],
    tensors: Sequence[NewTensor],
    *,
    identity: str,
) -> Cut:
    """Lay a file out.

    Args:
        parts: the headers of the model's files.
        pairs: the new file's keys and values, as they are in a file.
        tensors: its tensors, in their order.
        identity: what tells the model's files from others of the same header, as an ETag.
    """
    unit = alignment_of(parts[0])
    infos: list[bytes] = []
    at = 0
    for tensor in tensors:
        infos.append(_info(tensor, at))
        at += -(-tensor.size // unit) * unit
    head = struct.pack("<4sIQQ", b"GGUF", _VERSION, len(tensors), len(pairs))
    header = b"".join((head, *pairs, *infos))
    header += bytes(-len(header) % unit)
    pieces: list[Piece] = []
    place = len(header)
    for tensor in tensors:
        within = place
        for one in tensor.ranges:
            pieces.append(Piece(one.part, one.offset, one.size, within))
            within += one.size
        place += -(-tensor.size // unit) * unit
    merged = _merged(pieces, unit)
    named = hashlib.sha256(header)
    named.update(repr((FORMAT, identity, merged, [part.size for part in parts])).encode())
    return Cut(header, merged, place, named.hexdigest())


def number(key: str, value: int) -> bytes:
    """A key with a number of 32 bits, as in a file."""
    return _text(key) + struct.pack("<II", _U32_KIND, value)


def word(key: str, value: str) -> bytes:
    """A key with a string, as in a file."""
    return _text(key) + struct.pack("<I", STRING) + _text(value)


def _info(tensor: NewTensor, offset: int) -> bytes:
    shape = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
    return _text(tensor.name) + shape + struct.pack("<IQ", tensor.kind, offset)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _merged(pieces: Sequence[Piece], gap: int) -> tuple[Piece, ...]:
    """The same pieces, those made one that lie side by side in both files.

    Args:
        pieces: in the order of their places.
        gap: most bytes of padding between two, which are the same in both files.
    """
    merged = list(pieces[:1])
    for piece in pieces[1:]:
        last = merged[-1]
        beside = piece.part == last.part >= 0
        apart = piece.target - last.target
        if beside and piece.offset - last.offset == apart and 0 <= apart - last.size < gap:
            merged[-1] = msgspec.structs.replace(last, size=apart + piece.size)
        else:
            merged.append(piece)
    return tuple(merged)
