"""A model of the catalog that is too large for this worker alone: what planning it takes."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from shared.groups import DraftNeeds, SplitModel
from shared.model_shape import ModelShape
from worker.catalog import ModelSource
from worker.gguf_file import GgufFile
from worker.gguf_header import Header
from worker.hub import credentials
from worker.model_bytes import ModelBytes, open_model
from worker.preparing import Need
from worker.shape import draft_needs, shape_of

__all__ = ("SplitSource", "digest_of", "opened", "split_source")


class SplitSource(msgspec.Struct, frozen=True):
    """Where it is, what it is, and what is asked of it."""

    source: ModelSource
    place: Path | str
    """Path or URL; of a split file, its first part's."""
    header: Header
    shape: ModelShape
    digest: str
    context: int
    slots: int
    half: bool
    """Whether activations are to travel with 16 bits a number."""
    draft: DraftNeeds | None = None
    """Of the draft model that is at hand for it."""

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
            draft=self.draft,
        )


def digest_of(model: ModelBytes, parts: Sequence[GgufFile]) -> str:
    """Names a model by its headers, vocabulary included, so that hosts whose files differ part.

    Weights are not read: that would take minutes. Files of other weights under the same names, of
    the same types and sizes, with the same values beside them, are taken for the same.

    Raises:
        SourceError: a file cannot be read.
    """
    told = hashlib.sha256()
    for number, part in enumerate(parts):
        end = min((tensor.offset for tensor in part.tensors), default=0)
        for data in model.read(number, 0, end):
            told.update(data)
    return told.hexdigest()[:16]


@contextmanager
def opened(place: Path | str) -> Iterator[ModelBytes]:
    """The bytes of a model here, or on the hub; raises as `open_model`."""
    headers = None if isinstance(place, Path) else credentials()
    with open_model(place, headers) as model:
        yield model


def split_source(
    source: ModelSource,
    place: Path | str,
    header: Header,
    wanted: Need,
    *,
    half: bool = False,
    draft: Header | None = None,
) -> SplitSource:
    """Read what is needed from the headers of its files.

    Args:
        source: the model.
        place: where its file is, or the first of its files.
        header: of it.
        wanted: what is asked of it.
        half: whether activations are to travel with 16 bits a number.
        draft: the header of its draft model.

    Raises:
        GgufError: they lack what a model needs.
        SourceError: a file cannot be read.
    """
    with opened(place) as model:
        parts = model.headers()
        return SplitSource(
            source=source,
            place=place,
            header=header,
            shape=shape_of(parts, source.name),
            digest=digest_of(model, parts),
            context=wanted.context,
            slots=wanted.slots,
            half=half,
            draft=None if draft is None else draft_needs(draft),
        )
