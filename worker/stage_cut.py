"""Cutting a GGUF by layers: what the file of a stage says, and which bytes of the model it takes.

Pure: headers in, the new header and a list of byte ranges out; `worker.cut_file` writes them.
Layers are renumbered from 0, since llama.cpp wants them so. Values that hold a number for each
layer are cut likewise. A stage without the head never sees a token: instead of the vocabulary and
the embedding it carries a vocabulary of none and an embedding of `ROWS` rows of zeros, without
which llama.cpp does not load it (the least that its kernels take).
"""

import re
import struct
from collections.abc import Sequence

import msgspec

from worker.gguf_cut import Cut, NewTensor, Range, assemble, number, word
from worker.gguf_file import GgufError, GgufFile, Pair

__all__ = ("ROWS", "Wanted", "cut", "ends_at")

ROWS = 32

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


def ends_at(file: GgufFile) -> int:
    """Bytes of a file's header up to the end of its values."""
    return max((pair.stop for pair in file.pairs), default=24)


def cut(parts: Sequence[GgufFile], values: bytes, wanted: Wanted, *, identity: str = "") -> Cut:
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
    return assemble(parts, pairs, tensors, identity=identity)


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
    kept.append(number(f"{architecture}.block_count", wanted.stop - wanted.start))
    if not wanted.head:
        kept.append(number(f"{architecture}.vocab_size", ROWS))
        kept.append(word("tokenizer.ggml.model", "no_vocab"))
    return kept


def _sliced(raw: bytes, pair: Pair, wanted: Wanted) -> bytes:
    """The part of an array that is of the stage's layers."""
    at = 8 + len(pair.key.encode()) + 4  # its length and its kind stand around the key
    kind, _ = struct.unpack_from("<IQ", raw, at)
    size, begin = _SIZES[kind], at + 12
    values = raw[begin + wanted.start * size : begin + wanted.stop * size]
    return raw[:at] + struct.pack("<IQ", kind, wanted.stop - wanted.start) + values


def _tensors(parts: Sequence[GgufFile], wanted: Wanted, width: int) -> list[NewTensor]:
    """The stage's tensors under their new names."""
    found: list[NewTensor] = []
    if not wanted.head:
        zeros = Range(-1, 0, width * ROWS * 4)
        found.append(NewTensor(_EMBEDDING, (width, ROWS), _F32, (zeros,)))
    for part, file in enumerate(parts):
        for tensor in file.tensors:
            name = tensor.name
            if match := _BLOCK.fullmatch(name):
                layer = int(match[1])
                if not wanted.start <= layer < wanted.stop:
                    continue
                name = f"blk.{layer - wanted.start}.{match[2]}"
            elif name.startswith(_HEAD_ONLY) and not wanted.head:
                continue
            if not tensor.size:
                raise GgufError(
                    f"{file.name}: tensor {name!r} has type {tensor.kind}, which is not known here"
                )
            found.append(NewTensor.of(tensor, part, name))
    return found
