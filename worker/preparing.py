"""From an entry of the catalog to the configuration of an engine.

Has the file fetched if it is on the hub, reads and checks its header, and claims memory for it. All
that can be wrong with a model before llama.cpp sees it is found here, in one clear line.
"""

import asyncio
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from worker.catalog import ModelSource
from worker.engine_process import ENGINE_COMMAND
from worker.gguf_header import Header, estimate_memory, read_header
from worker.hub import fetch
from worker.link import EngineConfig
from worker.memory_budget import MemoryBudget, NotEnoughMemory

__all__ = ("ServingSettings", "prepare")

USUAL_CONTEXT = 4096
"""Tokens of one sequence that the engine sets up at most unless it is told a number."""

LEAST_CELLS = 512
"""KV cells without which a model is not worth loading."""


ALL_LAYERS = 9999
"""More than any model has."""


class ServingSettings(msgspec.Struct, frozen=True):
    """How models are served unless `models.toml` says otherwise; 0 leaves it to the engine."""

    slots: int = 8
    queue: int = 64
    context: int = 0
    threads: int = 0
    gpu_layers: int = 0
    """Negative: all."""
    cache: Path | None = None
    """Folder for downloads; None: huggingface_hub's own."""
    command: Sequence[str] = ENGINE_COMMAND


async def prepare(
    source: ModelSource,
    settings: ServingSettings,
    *,
    worker: str,
    budget: MemoryBudget,
    stopping: threading.Event,
    tell: Callable[[str], None],
) -> tuple[EngineConfig, Header]:
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
    try:
        path = await _locate(source, settings.cache, stopping, tell)
        tell("reading")
        header = await asyncio.to_thread(read_header, path)
    except BaseException:
        budget.waive()
        raise
    options = source.options
    slots = options.slots or settings.slots
    asked = options.context or settings.context
    context = asked or min(header.context_length or USUAL_CONTEXT, USUAL_CONTEXT)
    try:
        granted = budget.claim(
            least=estimate_memory(header, cells=asked or min(context, LEAST_CELLS)),
            # Beyond the estimate, so that what the engine adds does not cost it KV cells.
            wish=estimate_memory(header, cells=slots * context) * 5 // 4,
        )
    except NotEnoughMemory as error:
        raise NotEnoughMemory(f"{path.name}: {error}") from None
    gpu_layers = settings.gpu_layers if options.gpu_layers is None else options.gpu_layers
    config = EngineConfig(
        path=str(path),
        model=source.name,
        worker=worker,
        slots=slots,
        context=asked,
        threads=options.threads or settings.threads,
        gpu_layers=ALL_LAYERS if gpu_layers < 0 else gpu_layers,
        step_tokens=options.step_tokens or 512,
        memory_limit=granted,
        chat_template=options.chat_template,
        embeddings=options.embeddings,
    )
    return config, header


async def _locate(
    source: ModelSource, cache: Path | None, stopping: threading.Event, tell: Callable[[str], None]
) -> Path:
    file = source.file
    if isinstance(file, Path):
        return file
    tell(f"downloading {file.repo}")

    def progress(share: float) -> None:
        tell(f"downloading {share:.0%}")

    return await asyncio.to_thread(fetch, file, cache, progress=progress, stop=stopping)
