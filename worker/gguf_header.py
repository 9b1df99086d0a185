"""Reading what a GGUF file says about itself, without loading it.

It never imports llama.cpp, so that the agent and the planner may use it.
"""

from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

import msgspec

from worker.gguf_file import GgufError, GgufFile, Length, Tensor, Value, read_files, split_parts

__all__ = (
    "GgufError",
    "Header",
    "SpecialTokens",
    "estimate_memory",
    "header_of",
    "read_header",
    "split_parts",
)

_MOST_LAYERS = 100_000

_STATES = (".ssm.", ".wkv.", ".shortconv.")
"""Keys of layers with a recurrent state: Mamba and its hybrids, RWKV, LFM2."""


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
    upper bound where a window slides, and of 32-bit weights that are batch-invariant."""
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
    kv_element: int = 2
    """Bytes of one number of keys and values."""


def read_header(path: Path) -> Header:
    """Read the header of a model, and check that all of its tensors are in the file.

    Raises:
        GgufError: not there, no GGUF, truncated, or without what a model needs.
    """
    parts = read_files(path)
    return header_of(parts, path=str(path), modified=int(path.stat().st_mtime))


def header_of(parts: Sequence[GgufFile], *, path: str = "", modified: int = 0) -> Header:
    """Make a header of what has been read of all parts.

    Raises:
        GgufError: it lacks what a model needs.
    """
    values, file = parts[0].values, parts[0].name
    architecture = _text(values, "general.architecture")
    if not architecture:
        raise GgufError(f"{file}: no model: its header names no architecture")

    def number(key: str, default: int = 0) -> int:
        value = values.get(f"{architecture}.{key}", default)
        if isinstance(value, tuple):
            value = max(value, default=default)
        return value if isinstance(value, int) else default

    layers = number("block_count")
    if not 0 <= layers <= _MOST_LAYERS:
        raise GgufError(f"{file}: damaged: its header tells of {layers} layers")
    heads = number("attention.head_count")
    embedding = number("embedding_length")
    usual = embedding // heads if heads else 0
    key_length = number("attention.key_length", usual)
    value_length = number("attention.value_length", usual)
    heads_kv = _per_layer(values.get(f"{architecture}.attention.head_count_kv", heads), layers)
    tokens = values.get("tokenizer.ggml.tokens")
    element = 4 if values.get("general.file_type") == 0 else 2
    tensors = [tensor for part in parts for tensor in part.tensors]
    return Header(
        path=path,
        architecture=architecture,
        name=_text(values, "general.name"),
        file_type=_plain_int(values.get("general.file_type")),
        size=sum(part.size for part in parts),
        modified=modified,
        parts=len(parts),
        tensors=len(tensors),
        tensor_bytes=sum(tensor.size for tensor in tensors),
        block_count=layers,
        context_length=number("context_length"),
        embedding_length=embedding,
        feed_forward_length=number("feed_forward_length"),
        head_count=heads,
        head_counts_kv=heads_kv,
        key_length=key_length,
        value_length=value_length,
        kv_bytes_per_token=element * sum(heads_kv) * (key_length + value_length),
        vocabulary=tokens.count if isinstance(tokens, Length) else number("vocab_size"),
        experts=number("expert_count"),
        chat_template="tokenizer.chat_template" in values,
        basename=_text(values, "general.basename"),
        parameters=sum(prod(tensor.shape) for tensor in tensors),
        layer_bytes=_layer_bytes(tensors),
        tokenizer=_text(values, "tokenizer.ggml.model"),
        pre_tokenizer=_text(values, "tokenizer.ggml.pre"),
        special_tokens=SpecialTokens(
            *(
                _plain_int(values.get(f"tokenizer.ggml.{name}_token_id", -1))
                for name in SpecialTokens._fields
            )
        ),
        causal=values.get(f"{architecture}.attention.causal") is not False,
        kv_element=element,
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


def _layer_bytes(tensors: Iterable[Tensor]) -> dict[int, int]:
    table: dict[int, int] = {}
    for tensor in tensors:
        if len(tensor.shape) > 1 and tensor.name.startswith("blk."):
            table[tensor.kind] = table.get(tensor.kind, 0) + tensor.size
    return dict(sorted(table.items()))


def _per_layer(value: Value, layers: int) -> tuple[int, ...]:
    if isinstance(value, tuple):
        return tuple(int(item) for item in value[:layers])
    return (value if isinstance(value, int) else 0,) * layers
