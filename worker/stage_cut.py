"""Cutting a GGUF by layers: what the file of a stage says, and which bytes of the model it takes.

Pure: headers in, the new header and a list of byte ranges out; `worker.stage_file` writes them.
Layers are renumbered from 0, since llama.cpp wants them so. Values that hold a number for each
layer are cut likewise. A stage without the head never sees a token: instead of the vocabulary and
the embedding it carries a vocabulary of none and an embedding of `ROWS` rows of zeros, without
which llama.cpp does not load it (the least that its kernels take).
"""

import hashlib
import re
import struct
from collections.abc import Sequence

import msgspec

from worker.gguf_file import STRING, GgufError, GgufFile, Pair, Tensor

__all__ = ("FORMAT", "ROWS", "Piece", "StageCut", "Wanted", "cut", "ends_at")

ROWS = 32
FORMAT = 1
"""Of what is made here; part of a stage file's name."""

_VERSION = 3
_U32_KIND = 4
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value, by its kind."""
_F32 = 0
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
_EMBEDDING = "token_embd.weight"
_TOKENIZER = "tokenizer."
_HEAD_ONLY = ("token_embd.", "output.")


class Wanted(msgspec.Struct, frozen=True):
    """The layers from `start` to before `stop`, with the head or without."""

    start: int
    stop: int
    head: bool


class Piece(msgspec.Struct, frozen=True):
    """A range of bytes of one part of the model, and where it goes; part -1: zeros."""

    part: int
    offset: int
    size: int
    target: int
    """Bytes from the beginning of the stage file."""


class StageCut(msgspec.Struct, frozen=True):
    """A stage file: its beginning, then its tensors."""

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


def ends_at(file: GgufFile) -> int:
    """Bytes of a file's header up to the end of its values."""
    return max((pair.stop for pair in file.pairs), default=24)


def cut(
    parts: Sequence[GgufFile], values: bytes, wanted: Wanted, *, identity: str = ""
) -> StageCut:
    """Cut a model.

    Args:
        parts: the headers of all its files.
        values: the first file's beginning, to `ends_at` at least.
        wanted: which layers.
        identity: what tells these files from others of the same header, as an ETag.

    Raises:
        GgufError: there are no such layers, or a tensor's type is not known.
    """
    first = parts[0]
    architecture = first.values.get("general.architecture")
    count = first.values.get(f"{architecture}.block_count")
    if not isinstance(count, int):
        raise GgufError(f"{first.name}: no model: its header tells of no layers")
    if not 0 <= wanted.start < wanted.stop <= count:
        raise GgufError(
            f"{first.name}: it has layers 0 to {count - 1}; {wanted.start} to {wanted.stop - 1} "
            "are none of these"
        )
    pairs = _pairs(first, values, wanted, f"{architecture}", count)
    tensors = _tensors(parts, wanted, _width(first, f"{architecture}"))
    alignment = first.values.get("general.alignment")
    unit = alignment if isinstance(alignment, int) and alignment > 0 else 32
    infos: list[bytes] = []
    at = 0
    for tensor, _ in tensors:
        infos.append(_info(tensor, at))
        at += -(-tensor.size // unit) * unit
    head = struct.pack("<4sIQQ", b"GGUF", _VERSION, len(tensors), len(pairs))
    header = b"".join((head, *pairs, *infos))
    header += bytes(-len(header) % unit)
    places = [len(header)]
    for tensor, _ in tensors:
        places.append(places[-1] + -(-tensor.size // unit) * unit)
    pieces = _merged(
        [
            Piece(part, tensor.offset, tensor.size, place)
            for (tensor, part), place in zip(tensors, places, strict=False)
        ],
        unit,
    )
    named = hashlib.sha256(header)
    named.update(repr((FORMAT, identity, pieces, [part.size for part in parts])).encode())
    return StageCut(header, pieces, places[-1], named.hexdigest())


def _width(file: GgufFile, architecture: str) -> int:
    width = file.values.get(f"{architecture}.embedding_length")
    if not isinstance(width, int):
        raise GgufError(f"{file.name}: no model: its header does not tell the embedding's length")
    return width


def _pairs(
    file: GgufFile, values: bytes, wanted: Wanted, architecture: str, count: int
) -> list[bytes]:
    """The stage's keys and values, as they are in a file."""
    kept: list[bytes] = []
    dropped = {f"{architecture}.block_count"}
    if not wanted.head:
        dropped.add(f"{architecture}.vocab_size")
    for pair in file.pairs:
        if pair.key in dropped or pair.key.startswith("split."):
            continue
        if not wanted.head and pair.key.startswith(_TOKENIZER):
            continue
        value = file.values[pair.key]
        raw = values[pair.start : pair.stop]
        per_layer = isinstance(value, tuple) and len(value) == count
        if per_layer and pair.key.startswith(f"{architecture}."):
            raw = _sliced(raw, pair, wanted)
        kept.append(raw)
    kept.append(_number(f"{architecture}.block_count", wanted.stop - wanted.start))
    if not wanted.head:
        kept.append(_number(f"{architecture}.vocab_size", ROWS))
        kept.append(_word("tokenizer.ggml.model", "no_vocab"))
    return kept


def _sliced(raw: bytes, pair: Pair, wanted: Wanted) -> bytes:
    """The part of an array that is of the stage's layers."""
    at = 8 + len(pair.key.encode()) + 4  # its length and its kind stand around the key
    kind, _ = struct.unpack_from("<IQ", raw, at)
    size, begin = _SIZES[kind], at + 12
    values = raw[begin + wanted.start * size : begin + wanted.stop * size]
    return raw[:at] + struct.pack("<IQ", kind, wanted.stop - wanted.start) + values


def _tensors(parts: Sequence[GgufFile], wanted: Wanted, width: int) -> list[tuple[Tensor, int]]:
    """The stage's tensors under their new names, each with the part that it comes from."""
    found: list[tuple[Tensor, int]] = []
    if not wanted.head:
        found.append((Tensor(_EMBEDDING, (width, ROWS), _F32, 0, width * ROWS * 4), -1))
    for number, part in enumerate(parts):
        for tensor in part.tensors:
            if match := _BLOCK.fullmatch(tensor.name):
                layer = int(match[1])
                if not wanted.start <= layer < wanted.stop:
                    continue
                tensor = tensor._replace(name=f"blk.{layer - wanted.start}.{match[2]}")
            elif tensor.name.startswith(_HEAD_ONLY) and not wanted.head:
                continue
            if not tensor.size:
                raise GgufError(
                    f"{part.name}: tensor {tensor.name!r} has type {tensor.kind}, which is not "
                    "known here"
                )
            found.append((tensor, number))
    return found


def _info(tensor: Tensor, offset: int) -> bytes:
    shape = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
    return _text(tensor.name) + shape + struct.pack("<IQ", tensor.kind, offset)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _number(key: str, value: int) -> bytes:
    return _text(key) + struct.pack("<II", _U32_KIND, value)


def _word(key: str, value: str) -> bytes:
    return _text(key) + struct.pack("<I", STRING) + _text(value)


def _merged(pieces: Sequence[Piece], gap: int) -> tuple[Piece, ...]:
    """The same pieces, those made one that lie side by side in both files.

    Args:
        pieces: in the order of their places.
        gap: most bytes of padding between two, which are the same in both files.
    """
    merged = [pieces[0]]
    for piece in pieces[1:]:
        last = merged[-1]
        beside = piece.part == last.part >= 0
        apart = piece.target - last.target
        if beside and piece.offset - last.offset == apart and 0 <= apart - last.size < gap:
            merged[-1] = msgspec.structs.replace(last, size=apart + piece.size)
        else:
            merged.append(piece)
    return tuple(merged)
