"""Whether a draft is its target in another number format, whose keys and values it can go by.

Requantizing rounds matrices and leaves vectors (norms, biases) as they are, to the last bit, which
tells one model in two formats from two models of one shape, or from a model and its finetune. Such
a draft need not read what its target has read: the target's keys and values are what its own would
be without the rounding.
"""

from pathlib import Path
from typing import NamedTuple

from worker.gguf_file import GgufFile, Tensor, Value, read_files, split_parts

__all__ = ("same_model",)


class _Stored(NamedTuple):
    tensor: Tensor
    path: Path

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.tensor.offset)
            return file.read(self.tensor.size)


def same_model(target: Path, draft: Path) -> bool:
    """Whether two files hold one model, each in a format of its own.

    They have the same tensors in the same shapes, the same settings of the architecture as far as
    both name them, and the same vectors bit by bit.

    Raises:
        GgufError: one is no model that could be read.
        OSError: one cannot be read at all.
    """
    files = read_files(target), read_files(draft)
    ours, theirs = (_settings(parts[0]) for parts in files)
    if any(ours[key] != theirs[key] for key in ours.keys() & theirs.keys()):
        return False
    mine, its = _stored(target, files[0]), _stored(draft, files[1])
    if _shapes(mine) != _shapes(its):
        return False
    vectors = [name for name, one in mine.items() if len(one.tensor.shape) == 1]
    return bool(vectors) and all(_alike(mine[name], its[name]) for name in vectors)


def _settings(file: GgufFile) -> dict[str, Value]:
    architecture = file.values.get("general.architecture", "")
    named = {key: value for key, value in file.values.items() if key.startswith(f"{architecture}.")}
    return {"general.architecture": architecture, **named}


def _stored(path: Path, parts: tuple[GgufFile, ...]) -> dict[str, _Stored]:
    return {
        tensor.name: _Stored(tensor, where)
        for where, part in zip(split_parts(path), parts, strict=True)
        for tensor in part.tensors
    }


def _shapes(stored: dict[str, _Stored]) -> dict[str, tuple[int, ...]]:
    return {name: one.tensor.shape for name, one in stored.items()}


def _alike(ours: _Stored, theirs: _Stored) -> bool:
    return (
        ours.tensor.kind == theirs.tensor.kind
        and ours.tensor.size > 0
        and ours.read() == theirs.read()
    )
