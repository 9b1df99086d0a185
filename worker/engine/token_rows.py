"""The activations that tokens begin as: rows of the embedding matrix, read from a model's file.

In a ring the stage with the head holds the matrix and another one has the first layer, so that
tokens must be looked up before they are sent. The file stays mapped: what was looked up lately is
in the page cache, of a matrix that llama.cpp has mapped as well.
"""

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from worker.gguf_file import GgufError, read_files, split_parts

__all__ = ("TokenRows", "embedding_scale")

_SCALED = ("gemma", "gemma2", "gemma3")


def embedding_scale(architecture: str, width: int) -> float:
    """By what llama.cpp multiplies the rows that tokens are looked up as."""
    return float(width**0.5) if architecture in _SCALED else 1.0


class TokenRows:
    """Looks tokens up.

    Raises:
        GgufError: the file has no embedding matrix, or one of a type that cannot be read.
    """

    def __init__(self, path: Path) -> None:
        parts = read_files(path)
        found = [
            (file, tensor)
            for file, part in zip(split_parts(path), parts, strict=True)
            for tensor in part.tensors
            if tensor.name == "token_embd.weight"
        ]
        if not found:
            raise GgufError(f"{path.name}: it has no embedding matrix")
        ((file, tensor),) = found
        try:
            self._kind = gguf.GGMLQuantizationType(tensor.kind)
        except ValueError:
            raise _unreadable(path, f"number {tensor.kind}") from None
        width, count = tensor.shape
        self._rows = np.memmap(
            file,
            dtype=np.uint8,
            mode="r",
            offset=tensor.offset,
            shape=(count, tensor.size // count),
        )
        architecture = parts[0].values.get("general.architecture", "")
        self._scale = np.float32(embedding_scale(str(architecture), width))
        self.width = width
        try:
            self([0])
        except NotImplementedError:
            # What gguf says of a type whose numbers it cannot read: at the start, not in a step.
            raise _unreadable(path, self._kind.name) from None

    def __call__(self, tokens: Sequence[int] | NDArray[np.int32]) -> NDArray[np.float32]:
        """The activations of some tokens, (tokens, width)."""
        data = self._rows[np.asarray(tokens, dtype=np.int64)]
        rows = gguf.quants.dequantize(data, self._kind).astype(np.float32, copy=False)
        return np.asarray(rows * self._scale, dtype=np.float32)


def _unreadable(path: Path, kind: str) -> GgufError:
    return GgufError(f"{path.name}: its embedding has type {kind}, which cannot be read")
