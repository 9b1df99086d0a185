"""The file in which `mesh shard analyze` keeps what it has found, for `mesh shard build`."""

from pathlib import Path

import msgspec

from shared.sharding import ShardError

__all__ = ("Analysis", "read_analysis")


class Analysis(msgspec.Struct, frozen=True):
    """A text's score on a model, and what its routers gave to each expert."""

    model: str
    size: int
    """Bytes of the model, all parts."""
    text: str
    """Name of the file."""
    context: int
    tokens: int
    counted: int
    """Tokens that perplexity is of."""
    perplexity: float
    error: float
    masses: tuple[tuple[float, ...], ...]
    """By layer and expert; empty: the model has no experts."""


def read_analysis(path: Path) -> Analysis:
    """Read the file.

    Raises:
        ShardError: it cannot be read, or is none.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Analysis)
    except OSError as error:
        raise ShardError(f"{path}: {error.strerror or error}") from None
    except msgspec.DecodeError as error:
        raise ShardError(f"{path}: no analysis: {error}") from None
