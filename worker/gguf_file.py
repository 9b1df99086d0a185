"""Reading the header of a GGUF file: its values, and where each of its tensors lies.

Own reader over mmap: the gguf package builds one numpy array per vocabulary entry, which takes
seconds and hundreds of megabytes on a large vocabulary; this walks past them. It reads the
beginning of a file as well, of which the rest is elsewhere, and never imports llama.cpp, so that
the agent and the planner may use it.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import re
import struct
from math import prod
from pathlib import Path
from typing import NamedTuple

import msgspec

from worker.ggml_types import BLOCKS

__all__ = (
    "ARRAY",
    "STRING",
    "GgufError",
    "GgufFile",
    "Length",
    "Pair",
    "Tensor",
    "Truncated",
    "Value",
    "parse",
    "read_files",
    "split_parts",
)

_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
STRING, ARRAY = 8, 9
_U32, _U64 = _SCALARS[4], _SCALARS[10]
_KEPT_ARRAY = 4096
"""Arrays of numbers up to this length are kept (per-layer values); of others only the length is."""

_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


class GgufError(ValueError):
    """The file cannot be used; the message is one line that names the file and what is wrong."""


class Truncated(GgufError):
    """The header goes on beyond what is there."""


class Length(msgspec.Struct, frozen=True):
    """Stands for an array of which only the length is kept."""

    count: int


Value = int | float | bool | str | tuple[int | float | bool, ...] | Length


class Pair(NamedTuple):
    """Where a key with its value lies in the header, both included."""

    key: str
    kind: int
    start: int
    stop: int


class Tensor(NamedTuple):
    """One tensor, and where its numbers lie."""

    name: str
    shape: tuple[int, ...]
    """The fastest dimension first, as ggml has it."""
    kind: int
    """ggml's number of its type."""
    offset: int
    """Bytes from the beginning of its file."""
    size: int
    """Bytes; 0: of a type that is not known here."""


class GgufFile(msgspec.Struct, frozen=True):
    """One file's header."""

    name: str
    values: dict[str, Value]
    pairs: tuple[Pair, ...]
    tensors: tuple[Tensor, ...]
    size: int
    """Bytes of the whole file."""


def split_parts(path: Path) -> tuple[Path, ...]:
    """All parts of the model whose first part is `path`; just `path` if the file is not split."""
    match = _SPLIT.fullmatch(path.name)
    if match is None:
        return (path,)
    stem, count = match["stem"], int(match["count"])
    return tuple(
        path.with_name(f"{stem}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)
    )


def read_files(path: Path) -> tuple[GgufFile, ...]:
    """Read the headers of all parts of a model, and check that their tensors are there.

    Raises:
        GgufError: one is not there, no GGUF, or damaged.
    """
    return tuple(_read_file(part) for part in split_parts(path))


def _read_file(path: Path) -> GgufFile:
    name = path.name
    try:
        with path.open("rb") as file:
            start = file.read(8)
            if len(start) < 8 or start[:4] != b"GGUF":
                raise GgufError(f"{name}: not a GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                return parse(view, name, len(view))
    except OSError as error:
        raise GgufError(f"{name}: {error.strerror or error}") from None


def parse(view: mmap.mmap | bytes, name: str, size: int) -> GgufFile:
    """Read a header.

    Args:
        view: the file, or its beginning.
        name: what to call it in errors.
        size: bytes of the whole file.

    Raises:
        Truncated: `view` ends within the header.
        GgufError: it is no GGUF, or damaged, or `size` is too little for its tensors.
    """
    if len(view) >= 4 and view[:4] != b"GGUF":
        raise GgufError(f"{name}: not a GGUF file")
    cursor = _Cursor(view, name)
    cursor.skip(4)
    version = cursor.u32()
    if version not in (2, 3):
        order = "big-endian, or " if version & 0xFFFF == 0 else ""
        raise GgufError(f"{name}: {order}GGUF version {version}; versions 2 and 3 can be read")
    tensors, count = cursor.u64(), cursor.u64()
    values: dict[str, Value] = {}
    pairs: list[Pair] = []
    for _ in range(count):
        start = cursor.at
        key = cursor.string()
        kind = cursor.u32()
        values[key] = cursor.value(kind)
        pairs.append(Pair(key, kind, start, cursor.at))
    found = _read_tensors(cursor, tensors, values)
    if found:
        last = max(found, key=lambda tensor: tensor.offset + tensor.size)
        if last.offset + last.size > size:
            raise GgufError(
                f"{name}: truncated: tensor {last.name!r} ends at byte {last.offset + last.size}, "
                f"the file at {size}"
            )
    return GgufFile(name, values, tuple(pairs), found, size)


def _read_tensors(cursor: "_Cursor", count: int, values: dict[str, Value]) -> tuple[Tensor, ...]:
    infos: list[Tensor] = []
    for _ in range(count):
        name = cursor.string()
        shape = tuple(cursor.u64() for _ in range(min(cursor.u32(), 8)))
        kind, offset = cursor.u32(), cursor.u64()
        # Of a type newer than this table only the beginning can be checked.
        block, block_bytes = BLOCKS.get(kind, (1, 0))
        if not shape or shape[0] % block:
            raise GgufError(f"{cursor.name}: damaged: tensor {name!r} has shape {[*shape]}")
        infos.append(Tensor(name, shape, kind, offset, prod(shape) // block * block_bytes))
    alignment = values.get("general.alignment")
    unit = alignment if isinstance(alignment, int) and alignment > 0 else 32
    data = -(-cursor.at // unit) * unit
    return tuple(one._replace(offset=data + one.offset) for one in infos)


class _Cursor:
    """A position in the mapped file; every read is checked against its end."""

    def __init__(self, view: mmap.mmap | bytes, name: str) -> None:
        self.view = view
        self.name = name
        self.at = 0
        self.end = len(view)

    def skip(self, count: int) -> int:
        start = self.at
        if count > self.end - start:
            raise Truncated(f"{self.name}: truncated: its header goes on beyond byte {self.end}")
        self.at = start + count
        return start

    def scalar(self, form: struct.Struct) -> int | float | bool:
        value: int | float | bool = form.unpack_from(self.view, self.skip(form.size))[0]
        return value

    def u32(self) -> int:
        return int(self.scalar(_U32))

    def u64(self) -> int:
        return int(self.scalar(_U64))

    def string(self) -> str:
        count = self.u64()
        start = self.skip(count)
        return self.view[start : start + count].decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> Value:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self._array(depth + 1)
        form = _SCALARS.get(kind)
        if form is None:
            raise GgufError(f"{self.name}: damaged: its header has a value of unknown type {kind}")
        return self.scalar(form)

    def _array(self, depth: int) -> Value:
        if depth > 2:
            raise GgufError(f"{self.name}: damaged: its header nests arrays too deeply")
        kind, count = self.u32(), self.u64()
        form = _SCALARS.get(kind)
        if form is not None:
            start = self.skip(count * form.size)
            if count > _KEPT_ARRAY:
                return Length(count)
            stop = start + count * form.size
            return tuple(item for (item,) in form.iter_unpack(self.view[start:stop]))
        if kind == STRING:
            # The hot loop: a vocabulary has up to some 260,000 strings.
            at, end, view, unpack = self.at, self.end, self.view, _U64.unpack_from
            for _ in range(count):
                if at + 8 > end:
                    break
                at += 8 + unpack(view, at)[0]
            else:
                self.skip(at - self.at)
                return Length(count)
            self.skip(end + 1)
        for _ in range(count):
            self.value(kind, depth)
        return Length(count)
