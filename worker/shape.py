"""What a model file says of its weights, layer by layer, for the planner.

Run as `python -m worker.shape MODEL.gguf [DRAFT.gguf]` it prints that, and what the draft model
takes or null, as a JSON array for `mesh plan`.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from shared.groups import DraftNeeds
from shared.model_shape import Layer, ModelShape
from worker.drafts import may_draft
from worker.gguf_file import GgufError, GgufFile, read_files
from worker.gguf_header import Header, estimate_memory, header_of, read_header

__all__ = ("PERIODS", "draft_needs", "read_shape", "shape_of")

PERIODS = {"gemma2": 2, "gemma3": 6}
"""Layers after which kinds of layers repeat where llama.cpp knows that by their number alone: of
sliding windows, `set_swa_pattern` in src/llama-model.cpp."""

_BLOCK = re.compile(r"blk\.(\d+)\.")
_ENDS = ("output.", "output_norm.")
_EXPERTS = "_exps."


def read_shape(path: Path) -> ModelShape:
    """Read a model's shape from the headers of its file or files.

    Raises:
        GgufError: it is no model that could be read.
    """
    return shape_of(read_files(path), path.name.removesuffix(".gguf"))


def shape_of(parts: Sequence[GgufFile], name: str) -> ModelShape:
    """Take a model's shape from the headers of its parts.

    Raises:
        GgufError: it lacks what a model needs.
    """
    header = header_of(parts)
    count = header.block_count
    weights, experts = [0] * count, [0] * count
    embedding = output = shared = 0
    for tensor in (tensor for part in parts for tensor in part.tensors):
        if match := _BLOCK.match(tensor.name):
            number = int(match[1])
            if number >= count:
                raise GgufError(f"{parts[0].name}: damaged: {tensor.name!r} is of no layer")
            weights[number] += tensor.size
            experts[number] += tensor.size if _EXPERTS in tensor.name else 0
        elif tensor.name.startswith("token_embd."):
            embedding += tensor.size
        elif tensor.name.startswith(_ENDS):
            output += tensor.size
        else:
            shared += tensor.size
    element = header.kv_element
    heads = header.head_counts_kv
    used = parts[0].values.get(f"{header.architecture}.expert_used_count", 0)
    return ModelShape(
        name=name,
        architecture=header.architecture,
        layers=tuple(
            Layer(
                weights[n],
                element * heads[n] * (header.key_length + header.value_length),
                experts[n],
            )
            for n in range(count)
        ),
        embedding=embedding,
        output=output,
        width=header.embedding_length,
        feed_forward=header.feed_forward_length,
        heads=header.head_count,
        vocabulary=header.vocabulary,
        context=header.context_length,
        experts=header.experts,
        experts_used=used if isinstance(used, int) else 0,
        shared=shared,
        period=PERIODS.get(header.architecture, 1),
    )


def draft_needs(draft: Header) -> DraftNeeds:
    """As `estimate_memory` has it, whose terms are linear but for attention scores."""
    weights, cell = draft.tensor_bytes, draft.kv_bytes_per_token
    return DraftNeeds(
        weights, cell, estimate_memory(draft, cells=1, step_tokens=1) - weights - cell
    )


def main() -> None:
    """Print the shape of the model that is named first, and what its draft model takes."""
    model, *others = map(Path, sys.argv[1:])
    needs = None
    try:
        shape = read_shape(model)
        for other in others:
            draft = read_header(other)
            if not may_draft(read_header(model), draft):
                sys.exit(
                    f"{other.name} cannot draft for {model.name}: wanted a model of the same "
                    "tokens and half its size at most"
                )
            needs = draft_needs(draft)
    except GgufError as error:
        sys.exit(str(error))
    sys.stdout.write(msgspec.json.encode((shape, needs)).decode())


if __name__ == "__main__":
    main()
