"""Reading what a GGUF file says about itself, without loading it.

Own reader over mmap: the gguf package builds one numpy array per vocabulary entry, which takes
seconds and hundreds of megabytes on a large vocabulary; this walks past them. It never imports
llama.cpp, so that the agent and the planner may use it.
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
    "GgufError",
    "Header",
    "SpecialTokens",
    "estimate_memory",
    "read_header",
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
_STRING, _ARRAY = 8, 9
_U32, _U64 = _SCALARS[4], _SCALARS[10]
_KEPT_ARRAY = 4096
"""Arrays of numbers up to this length are kept (per-layer values); of others only the length is."""

_MOST_LAYERS = 100_000

_STATES = (".ssm.", ".wkv.", ".shortconv.")
"""Keys of layers with a recurrent state: Mamba and its hybrids, RWKV, LFM2."""

_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


class GgufError(ValueError):
    """The file cannot be used; the message is one line that names the file and what is wrong."""


class _Length(msgspec.Struct, frozen=True):
    """Stands for an array of which only the length is kept."""

    count: int


Value = int | float | bool | str | tuple[int | float | bool, ...] | _Length


class SpecialTokens(NamedTuple):
    """Ids that the header names; -1: it names none."""

    bos: int = -1
    eos: int = -1
    eot: int = -1


class Header(msgspec.Struct, frozen=True):
    """What the planner and the operator want to know of a model."""

    path: str
    architecture: str
    name: str
    file_type: int
    size: int
    """Bytes of all parts."""
    modified: int
    """Unix time of the first part."""
    parts: int
    tensors: int
    tensor_bytes: int
    block_count: int
    context_length: int
    embedding_length: int
    feed_forward_length: int
    head_count: int
    head_counts_kv: tuple[int, ...]
    """Per layer."""
    key_length: int
    value_length: int
    kv_bytes_per_token: int
    """With 16-bit keys and values (32-bit ones where the weights are), all layers together; an
    upper bound where a window slides."""
    vocabulary: int
    experts: int
    chat_template: bool
    basename: str = ""
    """Name of the family without size and version, as "SmolLM2"; empty where the file has none."""
    parameters: int = 0
    """Elements of all tensors."""
    layer_bytes: dict[int, int] = {}
    """Bytes of the layers' matrices by ggml tensor type, embedding and output left out."""
    tokenizer: str = ""
    """`tokenizer.ggml.model`, as "gpt2"."""
    pre_tokenizer: str = ""
    """`tokenizer.ggml.pre`, as "smollm"."""
    special_tokens: SpecialTokens = SpecialTokens()
    causal: bool = True
    """False: every token sees those after it, so the model cannot generate."""
    recurrent: bool = False
    """Some layers keep a state that cannot go back behind a token, as drafting needs it."""


class _Tensors(msgspec.Struct, frozen=True):
    count: int
    size: int
    """Bytes."""
    elements: int
    layer_bytes: dict[int, int]


class _Part(NamedTuple):
    values: dict[str, Value]
    size: int
    tensors: _Tensors


def split_parts(path: Path) -> tuple[Path, ...]:
    """All parts of the model whose first part is `path`; just `path` if the file is not split."""
    match = _SPLIT.fullmatch(path.name)
    if match is None:
        return (path,)
    stem, count = match["stem"], int(match["count"])
    return tuple(
        path.with_name(f"{stem}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)
    )


def read_header(path: Path) -> Header:
    """Read the header of a model, and check that all of its tensors are in the file.

    Raises:
        GgufError: not there, no GGUF, truncated, or without what a model needs.
    """
    files = split_parts(path)
    parts = [_read_part(file) for file in files]
    values = parts[0].values
    architecture = _text(values, "general.architecture")
    if not architecture:
        raise GgufError(f"{path.name}: no model: its header names no architecture")

    def number(key: str, default: int = 0) -> int:
        value = values.get(f"{architecture}.{key}", default)
        if isinstance(value, tuple):
            value = max(value, default=default)
        return value if isinstance(value, int) else default

    layers = number("block_count")
    if not 0 <= layers <= _MOST_LAYERS:
        raise GgufError(f"{path.name}: damaged: its header tells of {layers} layers")
    heads = number("attention.head_count")
    embedding = number("embedding_length")
    usual = embedding // heads if heads else 0
    key_length = number("attention.key_length", usual)
    value_length = number("attention.value_length", usual)
    heads_kv = _per_layer(values.get(f"{architecture}.attention.head_count_kv", heads), layers)
    tokens = values.get("tokenizer.ggml.tokens")
    element = 4 if values.get("general.file_type") == 0 else 2
    return Header(
        path=str(path),
        architecture=architecture,
        name=_text(values, "general.name"),
        file_type=_plain_int(values.get("general.file_type")),
        size=sum(part.size for part in parts),
        modified=int(path.stat().st_mtime),
        parts=len(parts),
        tensors=sum(part.tensors.count for part in parts),
        tensor_bytes=sum(part.tensors.size for part in parts),
        block_count=layers,
        context_length=number("context_length"),
        embedding_length=embedding,
        feed_forward_length=number("feed_forward_length"),
        head_count=heads,
        head_counts_kv=heads_kv,
        key_length=key_length,
        value_length=value_length,
        kv_bytes_per_token=element * sum(heads_kv) * (key_length + value_length),
        vocabulary=tokens.count if isinstance(tokens, _Length) else number("vocab_size"),
        experts=number("expert_count"),
        chat_template="tokenizer.chat_template" in values,
        basename=_text(values, "general.basename"),
        parameters=sum(part.tensors.elements for part in parts),
        layer_bytes=_added([part.tensors.layer_bytes for part in parts]),
        tokenizer=_text(values, "tokenizer.ggml.model"),
        pre_tokenizer=_text(values, "tokenizer.ggml.pre"),
        special_tokens=SpecialTokens(
            *(
                _plain_int(values.get(f"tokenizer.ggml.{name}_token_id", -1))
                for name in SpecialTokens._fields
            )
        ),
        causal=values.get(f"{architecture}.attention.causal") is not False,
        recurrent=any(
            key.startswith(tuple(architecture + end for end in _STATES)) for key in values
        ),
    )


def estimate_memory(header: Header, *, cells: int, step_tokens: int = 512) -> int:
    """Estimate the bytes an engine needs: weights, `cells` of KV, and compute buffers.

    llama.cpp reserves its buffers for the widest step: the logits of all its tokens, or the
    attention scores, whichever is more, beside the activations of one layer.
    """
    width = min(step_tokens, max(1, cells))
    logits = header.vocabulary * width * 4
    scores = header.head_count * min(cells, header.context_length or cells) * width * 4
    activations = width * 4 * (8 * header.embedding_length + 3 * header.feed_forward_length)
    return (
        header.tensor_bytes + cells * header.kv_bytes_per_token + max(logits, scores) + activations
    )


def _text(values: dict[str, Value], key: str) -> str:
    value = values.get(key, "")
    return value if isinstance(value, str) else ""


def _plain_int(value: Value | None) -> int:
    return value if isinstance(value, int) else 0


def _added(tables: list[dict[int, int]]) -> dict[int, int]:
    kinds = {kind for table in tables for kind in table}
    return {kind: sum(table.get(kind, 0) for table in tables) for kind in sorted(kinds)}


def _per_layer(value: Value, layers: int) -> tuple[int, ...]:
    if isinstance(value, tuple):
        return tuple(int(item) for item in value[:layers])
    return (value if isinstance(value, int) else 0,) * layers


class _Cursor:
    """A position in the mapped file; every read is checked against its end."""

    def __init__(self, view: mmap.mmap, name: str) -> None:
        self.view = view
        self.name = name
        self.at = 0
        self.end = len(view)

    def skip(self, count: int) -> int:
        start = self.at
        if count > self.end - start:
            raise GgufError(f"{self.name}: truncated: its header goes on beyond byte {self.end}")
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
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
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
                return _Length(count)
            stop = start + count * form.size
            return tuple(item for (item,) in form.iter_unpack(self.view[start:stop]))
        if kind == _STRING:
            # The hot loop: a vocabulary has up to some 260,000 strings.
            at, end, view, unpack = self.at, self.end, self.view, _U64.unpack_from
            for _ in range(count):
                if at + 8 > end:
                    break
                at += 8 + unpack(view, at)[0]
            else:
                self.skip(at - self.at)
                return _Length(count)
            self.skip(end + 1)
        for _ in range(count):
            self.value(kind, depth)
        return _Length(count)


def _read_part(path: Path) -> _Part:
    name = path.name
    try:
        with path.open("rb") as file:
            start = file.read(8)
            if len(start) < 8 or start[:4] != b"GGUF":
                raise GgufError(f"{name}: not a GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                return _parse(_Cursor(view, name))
    except OSError as error:
        raise GgufError(f"{name}: {error.strerror or error}") from None


def _parse(cursor: _Cursor) -> _Part:
    name = cursor.name
    cursor.skip(4)
    version = cursor.u32()
    if version not in (2, 3):
        order = "big-endian, or " if version & 0xFFFF == 0 else ""
        raise GgufError(f"{name}: {order}GGUF version {version}; versions 2 and 3 can be read")
    tensors, count = cursor.u64(), cursor.u64()
    values: dict[str, Value] = {}
    for _ in range(count):
        key = cursor.string()
        values[key] = cursor.value(cursor.u32())
    return _Part(values, cursor.end, _read_tensors(cursor, tensors, values))


def _read_tensors(cursor: _Cursor, count: int, values: dict[str, Value]) -> _Tensors:
    """Sum the tensors up, and make sure that all of them are in the file."""
    total, elements, last, last_name = 0, 0, 0, ""
    layer_bytes: dict[int, int] = {}
    for _ in range(count):
        tensor = cursor.string()
        dimensions = [cursor.u64() for _ in range(min(cursor.u32(), 8))]
        kind, offset = cursor.u32(), cursor.u64()
        # Of a type newer than this table only the beginning can be checked.
        block, block_bytes = BLOCKS.get(kind, (1, 0))
        if not dimensions or dimensions[0] % block:
            raise GgufError(f"{cursor.name}: damaged: tensor {tensor!r} has shape {dimensions}")
        size = prod(dimensions) // block * block_bytes
        total += size
        elements += prod(dimensions)
        if len(dimensions) > 1 and tensor.startswith("blk."):
            layer_bytes[kind] = layer_bytes.get(kind, 0) + size
        if offset + size > last:
            last, last_name = offset + size, tensor
    alignment = _plain_int(values.get("general.alignment")) or 32
    end = -(-cursor.at // alignment) * alignment + last
    if count and end > cursor.end:
        raise GgufError(
            f"{cursor.name}: truncated: tensor {last_name!r} ends at byte {end}, "
            f"the file at {cursor.end}"
        )
    return _Tensors(count, total, elements, layer_bytes)
