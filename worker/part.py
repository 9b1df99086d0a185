"""From a group and this worker's part in it to the configuration of an engine.

The stage's file is cut from the model's, once; only the part's own bytes are read for it. The head
has a draft model beside its part where its worker has the room: the longer the way round, the more
it is worth.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec

from shared.broker_config import ring_url, ring_user
from shared.groups import Group
from worker.cache_folder import cache_folder
from worker.cut_file import drop_unused, make_stage
from worker.gguf_header import Header, estimate_memory
from worker.link import EngineConfig, RingPlace
from worker.preparing import ServingSettings, choose_draft
from worker.split_source import SplitSource, opened
from worker.stage_cut import Wanted

__all__ = ("Draft", "PartRefused", "PartStopped", "draft_of_head", "place_in", "prepare_part")


class PartRefused(Exception):
    """This worker cannot have the part; the message is one line."""


class PartStopped(Exception):
    """The worker is ending; what has been written is kept."""


async def prepare_part(
    split: SplitSource,
    settings: ServingSettings,
    group: Group,
    *,
    worker: str,
    nats: str,
    stopping: threading.Event,
    tell: Callable[[str], None],
) -> EngineConfig:
    """Make the file of this worker's part, and say how its engine is to be started.

    Args:
        split: the model.
        settings: for what its own options leave open.
        group: names this worker.
        worker: who it is.
        nats: the worker's own URL of the server.
        stopping: ends the work when set.
        tell: hears what is being done, from another thread.

    Raises:
        PartRefused: the file here is another model's than the group's, or it has no such part.
        PartStopped: `stopping` was set.
        GgufError: the model's file is damaged.
        SourceError: it cannot be read, or the stage's cannot be written.
    """
    index = group.index(worker)
    if index is None:
        raise PartRefused(f"{worker} has no part in group {group.id}")
    if split.digest != group.digest:
        raise PartRefused(f"the file of {split.source.name} here is another one than the head's")
    part = group.parts[index]
    if part.stop > split.header.block_count:
        raise PartRefused(f"{split.source.name} has {split.header.block_count} layers")
    alone = len(group.parts) == 1
    if alone and isinstance(split.place, Path):
        path = split.place
    else:
        wanted = Wanted(part.start, part.stop, head=part is group.head)

        def progress(done: int, size: int) -> None:
            if stopping.is_set():
                raise PartStopped
            tell(f"cutting layers {part.start} to {part.stop - 1}: {done / size:.0%}")

        path = await asyncio.to_thread(_made, split.place, wanted, progress)
    options = split.source.options
    config = EngineConfig(
        path=str(path),
        model=split.source.name,
        worker=worker,
        slots=group.slots,
        context=group.context,
        threads=options.threads or settings.threads,
        gpu_layers=settings.gpu_layers if options.gpu_layers is None else options.gpu_layers,
        step_tokens=group.step,
        chat_template=options.chat_template,
        embeddings=options.embeddings and alone,
        speculation=options.speculation or settings.speculation,
        batch_invariant=options.batch_invariant or settings.batch_invariant,
    )
    if alone:
        return config
    return msgspec.structs.replace(config, ring=place_in(group, worker, nats))


class Draft(NamedTuple):
    """A draft model that the head could have."""

    header: Header
    memory: int
    """Bytes, beside those of the head's part."""


async def draft_of_head(
    split: SplitSource,
    settings: ServingSettings,
    group: Group,
    *,
    stopping: threading.Event,
    tell: Callable[[str], None],
) -> Draft | None:
    """The draft model for the head of a group; None: there is none, or none is wanted.

    Args:
        split: the model.
        settings: for what its own options leave open.
        group: whose slots it is to follow.
        stopping: ends a download when set.
        tell: hears what is being done, from another thread.

    Raises:
        DownloadStopped: `stopping` was set.
    """
    if (split.source.options.speculation or settings.speculation) != "auto":
        return None
    header = await choose_draft(split.source, split.header, settings.cache, stopping, tell)
    if header is None:
        return None
    cells = group.slots * group.context
    return Draft(header, estimate_memory(header, cells=cells, step_tokens=group.step))


def _made(place: Path | str, wanted: Wanted, progress: Callable[[int, int], None]) -> Path:
    folder = cache_folder() / "stages"
    with opened(place) as model:
        made = make_stage(model, wanted, folder, progress=progress)
        drop_unused(folder, model.name, now=time.time())
    return made.path


def place_in(group: Group, worker: str, nats: str) -> RingPlace:
    """Where this worker's stage stands in a group; `nats` is the worker's own URL.

    Raises:
        PartRefused: it has no part in it.
    """
    index = group.index(worker)
    if index is None:
        raise PartRefused(f"{worker} has no part in group {group.id}")
    return RingPlace(
        group=group.id,
        workers=group.workers,
        index=index,
        nats=ring_url(nats),
        half=group.half,
        identity=ring_user(worker),
    )
