"""What this worker could load: the models of its catalog whose files are at hand and fit.

Of a model that is too large for it alone it could carry a part, if others carry the rest.

Told in every beat, so that each worker and router knows what the fleet could serve, and the memory
that it would take. Nothing is downloaded for it, and llama.cpp is not asked: a header is read for
each file, so that what is told is an estimate of the kind that the loading itself starts from.
"""

from collections.abc import Container, Sequence
from pathlib import Path
from typing import NamedTuple

import structlog

from shared.planning import SPLITTABLE
from shared.presence import LoadableModel
from worker.catalog import ModelSource
from worker.drafts import find_draft, read_candidates
from worker.gguf_header import GgufError, Header, header_of, read_header
from worker.hub import HubSource, address, at_hand
from worker.memory_budget import MOST_PREFIXES
from worker.model_bytes import SourceError
from worker.preparing import ServingSettings, need
from worker.split_source import SplitSource, opened, split_source

__all__ = ("Survey", "survey")

PREFIX_SHARE = 4
"""Of a model's bytes, one part in so many is set aside for prefixes at most: they are a help, and a
small model should not keep others out with them."""

_log = structlog.get_logger()


class Survey(NamedTuple):
    """What could be loaded, by name."""

    whole: tuple[LoadableModel, ...]
    split: tuple[SplitSource, ...]
    """Those of which only a part could."""


def survey(
    sources: Sequence[ModelSource],
    settings: ServingSettings,
    memory: int,
    named: Container[str] = (),
) -> Survey:
    """List the models that could be loaded into `memory` bytes, each alone. Blocks.

    A model that wants more than there is, is told with all of `memory`, as long as the least that
    it needs is there. One whose file is broken is left out and logged; so is one that is too large
    and cannot be split.

    Args:
        sources: the models.
        settings: for what their own options leave open.
        memory: bytes.
        named: those that are to be served whatever happens: if they are on the hub, their headers
            are read there, so that of one that is too large only a part is fetched.
    """
    found: list[LoadableModel] = []
    split: list[SplitSource] = []
    for source in sources:
        path = _path(source.file, settings.cache)
        place = path or _remote(source, named)
        if place is None:
            continue
        try:
            header = _header(place)
            draft = _draft(source, settings, header)
            wanted = need(source, settings, header, draft)
            if wanted.least > memory:
                if header.architecture not in SPLITTABLE or header.block_count < 2:
                    raise GgufError(f"it needs {wanted.least} bytes, there are {memory}")
                one = split_source(source, place, header, wanted, half=settings.half, draft=draft)
                split.append(one)
                continue
        except (GgufError, SourceError) as error:
            _log.warning("model.not_loadable", model=source.name, reason=str(error))
            continue
        if path is None:
            continue
        engine = wanted.wish + wanted.draft
        most = MOST_PREFIXES if settings.prefix_memory is None else settings.prefix_memory
        prefixes = min(most, engine // PREFIX_SHARE)
        found.append(
            LoadableModel(
                name=source.name,
                memory=min(memory, engine + prefixes),
                context=wanted.context,
                slots=wanted.slots,
                size=header.size,
                created=header.modified,
                embeddings=source.options.embeddings,
                aliases=source.options.aliases,
            )
        )
    return Survey(
        tuple(sorted(found, key=lambda model: model.name)),
        tuple(sorted(split, key=lambda one: one.source.name)),
    )


def _remote(source: ModelSource, named: Container[str]) -> str | None:
    if isinstance(source.file, Path) or source.name not in named:
        return None
    return address(source.file)


def _header(place: Path | str) -> Header:
    if isinstance(place, Path):
        return read_header(place)
    with opened(place) as model:
        return header_of(model.headers(), path=place)


def _draft(source: ModelSource, settings: ServingSettings, target: Header) -> Header | None:
    if (source.options.speculation or settings.speculation) != "auto":
        return None
    if source.draft is None:
        return find_draft(target, read_candidates(source.candidates, most_bytes=target.size))
    path = _path(source.draft, settings.cache)
    try:
        return None if path is None else read_header(path)
    except GgufError:
        # The model is served without it, and the loading says so.
        return None


def _path(file: Path | HubSource, cache: Path | None) -> Path | None:
    return file if isinstance(file, Path) else at_hand(file, cache)
