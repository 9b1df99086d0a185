"""From an entry of the catalog to the configuration of an engine.

Has the file fetched if it is on the hub, reads and checks its header, chooses a draft, and claims
memory for both. All that can be wrong with a model before llama.cpp sees it is found here, in one
clear line; what is wrong with a draft only costs the draft.
"""

import asyncio
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import structlog

from worker.catalog import ModelSource, Speculation
from worker.drafts import find_draft, read_candidates
from worker.engine_process import ENGINE_COMMAND
from worker.gguf_header import GgufError, Header, estimate_memory, read_header
from worker.hub import HubError, HubSource, fetch
from worker.link import MOST_CONTEXT, BatchInvariance, EngineConfig
from worker.memory_budget import MemoryBudget, NotEnoughMemory, usual_prefixes

__all__ = ("Need", "Prepared", "ServingSettings", "choose_draft", "need", "prepare", "tell_draft")

LEAST_CELLS = 512
"""KV cells without which a model is not worth loading."""

_log = structlog.get_logger()


class ServingSettings(msgspec.Struct, frozen=True):
    """How models are served unless `models.toml` says otherwise; 0 leaves it to the engine."""

    slots: int = 8
    queue: int = 64
    context: int = 0
    threads: int = 0
    gpu_layers: int | None = None
    """Negative: all; None: as many as fit into what GPUs have free."""
    speculation: Speculation = "auto"
    batch_invariant: BatchInvariance = "auto"
    prefix_memory: int | None = None
    """Bytes per model for the KV of retired sequences whose slots were needed; 0: none; None: as
    `usual_prefixes` says."""
    half: bool = False
    """Whether activations of models that several workers carry travel with 16 bits a number."""
    cache: Path | None = None
    """Folder for downloads; None: huggingface_hub's own."""
    command: Sequence[str] = ENGINE_COMMAND


class Need(NamedTuple):
    """What a model asks of a worker; bytes."""

    slots: int
    context: int
    """Tokens of one sequence."""
    least: int
    """Without which it cannot be served."""
    wish: int
    """Beyond which it has no use for more."""
    draft: int
    """Its draft's; 0: it has none."""


def need(
    source: ModelSource, settings: ServingSettings, header: Header, draft: Header | None
) -> Need:
    """Estimate from the headers what a model and its draft take."""
    options = source.options
    slots = options.slots or settings.slots
    asked = options.context or settings.context
    context = asked or min(header.context_length or MOST_CONTEXT, MOST_CONTEXT)
    return Need(
        slots=slots,
        context=context,
        least=estimate_memory(header, cells=asked or min(context, LEAST_CELLS)),
        # Beyond the estimate, so that what the engine adds does not cost it KV cells.
        wish=estimate_memory(header, cells=slots * context) * 5 // 4,
        draft=estimate_memory(draft, cells=slots * context) if draft else 0,
    )


class Prepared(NamedTuple):
    """An engine that can be started."""

    config: EngineConfig
    header: Header
    memory: int
    """Bytes set aside for the model, its draft and its prefixes; where memory is not limited, what
    they wish for."""


async def prepare(
    source: ModelSource,
    settings: ServingSettings,
    *,
    worker: str,
    budget: MemoryBudget,
    stopping: threading.Event,
    tell: Callable[[str], None],
) -> Prepared:
    """Make everything ready for an engine to start.

    Args:
        source: the model.
        settings: for what the model's own options leave open.
        worker: this worker's identity.
        budget: where the memory comes from; every call claims, or waives its claim.
        stopping: ends a download when set.
        tell: hears what is being done, possibly from another thread.

    Raises:
        HubError: the file cannot be fetched.
        DownloadStopped: `stopping` was set.
        GgufError: it is no GGUF, truncated, or otherwise no model.
        NotEnoughMemory: it does not fit.
    """
    options = source.options
    speculation = options.speculation or settings.speculation
    draft: Header | None = None
    try:
        path = await _locate(source.file, settings.cache, stopping, tell)
        tell("reading")
        header = await asyncio.to_thread(read_header, path)
        if speculation == "auto":
            draft = await choose_draft(source, header, settings.cache, stopping, tell)
    except BaseException:
        budget.waive()
        raise
    wanted = need(source, settings, header, draft)
    try:
        granted = budget.claim(
            least=wanted.least,
            wish=wanted.wish,
            draft=wanted.draft,
            prefixes=usual_prefixes(budget.total)
            if settings.prefix_memory is None
            else settings.prefix_memory,
        )
    except NotEnoughMemory as error:
        raise NotEnoughMemory(f"{path.name}: {error}") from None
    if draft is not None:
        tell_draft(source, draft, granted.draft)
    config = EngineConfig(
        path=str(path),
        model=source.name,
        worker=worker,
        slots=wanted.slots,
        context=options.context or settings.context,
        threads=options.threads or settings.threads,
        gpu_layers=settings.gpu_layers if options.gpu_layers is None else options.gpu_layers,
        step_tokens=options.step_tokens or 512,
        memory_limit=granted.model,
        prefix_memory=granted.prefixes,
        chat_template=options.chat_template,
        embeddings=options.embeddings,
        draft=draft.path if draft is not None and granted.draft else "",
        speculation=speculation,
        batch_invariant=options.batch_invariant or settings.batch_invariant,
    )
    memory = (granted.model or wanted.wish) + (wanted.draft if granted.draft else 0)
    return Prepared(config, header, memory + granted.prefixes)


async def choose_draft(
    source: ModelSource,
    target: Header,
    cache: Path | None,
    stopping: threading.Event,
    tell: Callable[[str], None],
) -> Header | None:
    """The draft that was asked for, else the best of the files at hand; None: there is none.

    Raises:
        DownloadStopped: `stopping` was set.
    """
    if source.draft is None:
        candidates = await asyncio.to_thread(
            read_candidates, source.candidates, most_bytes=target.size
        )
        return find_draft(target, candidates)
    try:
        path = await _locate(source.draft, cache, stopping, tell)
        return await asyncio.to_thread(read_header, path)
    except (HubError, GgufError) as error:
        _log.warning("draft.unusable", model=source.name, reason=" ".join(str(error).split()))
        return None


def tell_draft(source: ModelSource, draft: Header, granted: bool) -> None:
    """Log which draft was found, and whether there was memory for it."""
    name = Path(draft.path).name
    if granted:
        found = source.draft is None
        _log.info("draft.chosen", model=source.name, draft=name, found_by_itself=found)
    else:
        _log.warning(
            "draft.left_out",
            model=source.name,
            draft=name,
            reason="no memory for it beside the model; --memory, --slots or --ctx makes room",
        )


async def _locate(
    file: Path | HubSource,
    cache: Path | None,
    stopping: threading.Event,
    tell: Callable[[str], None],
) -> Path:
    if isinstance(file, Path):
        return file
    tell(f"downloading {file.repo}")

    def progress(share: float) -> None:
        tell(f"downloading {share:.0%}")

    return await asyncio.to_thread(fetch, file, cache, progress=progress, stop=stopping)
