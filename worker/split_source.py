"""A model of the catalog that is too large for this worker alone: what planning it takes."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import msgspec

from shared.groups import SplitModel
from shared.model_shape import ModelShape
from worker.catalog import ModelSource
from worker.gguf_file import GgufFile
from worker.gguf_header import Header
from worker.model_bytes import FileBytes
from worker.preparing import Need
from worker.shape import shape_of

__all__ = ("SplitSource", "digest_of", "split_source")


class SplitSource(msgspec.Struct, frozen=True):
    """Where it is, what it is, and what is asked of it."""

    source: ModelSource
    path: Path
    """Of a split file, its first part."""
    header: Header
    shape: ModelShape
    digest: str
    context: int
    slots: int
    half: bool
    """Whether activations are to travel with 16 bits a number."""

    def told(self, *, pinned: bool, missing: str) -> SplitModel:
        """As a beat tells of it."""
        return SplitModel(
            name=self.source.name,
            digest=self.digest,
            size=self.header.size,
            created=self.header.modified,
            context=self.context,
            slots=self.slots,
            half=self.half,
            pinned=pinned,
            aliases=self.source.options.aliases,
            missing=missing,
        )


def digest_of(path: Path, parts: Sequence[GgufFile]) -> str:
    """Names a model by its headers, vocabulary included, so that hosts whose files differ part.

    Weights are not read: that would take minutes. Files of other weights under the same names, of
    the same types and sizes, with the same values beside them, are taken for the same.

    Raises:
        SourceError: a file cannot be read.
    """
    told = hashlib.sha256()
    source = FileBytes(path)
    for number, part in enumerate(parts):
        end = min((tensor.offset for tensor in part.tensors), default=0)
        for data in source.read(number, 0, end):
            told.update(data)
    return told.hexdigest()[:16]


def split_source(
    source: ModelSource,
    path: Path,
    header: Header,
    parts: Sequence[GgufFile],
    wanted: Need,
    *,
    half: bool = False,
) -> SplitSource:
    """Take what is needed from the headers of its files.

    Raises:
        GgufError: they lack what a model needs.
        SourceError: a file cannot be read.
    """
    return SplitSource(
        source=source,
        path=path,
        header=header,
        shape=shape_of(parts, source.name),
        digest=digest_of(path, parts),
        context=wanted.context,
        slots=wanted.slots,
        half=half,
    )
