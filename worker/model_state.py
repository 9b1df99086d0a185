"""What a beat tells of a model, from what is known of it in several places."""

import msgspec

from shared.presence import ModelState
from worker.admission import Admission
from worker.gguf_header import Header
from worker.link import EngineStats, Ready

__all__ = ("filled_in", "under_all_names")


def filled_in(
    state: ModelState,
    *,
    admission: Admission,
    stats: EngineStats,
    engine: Ready | None,
    header: Header | None,
) -> ModelState:
    """Add what the engine, the file and the account of slots say.

    Args:
        state: what the serving itself knows; advice of the engine stands in for its detail when the
            model is ready.
        admission: slots and queue.
        stats: of the engine, the last that were told.
        engine: what was set up; None: nothing yet.
        header: of the model's file; None: not read yet.
    """
    ready = state.state == "ready"
    return msgspec.structs.replace(
        state,
        slots=admission.slots,
        free=admission.free if ready else 0,
        queued=admission.queued,
        queue_limit=admission.queue_limit,
        context=engine.context if engine else 0,
        embeddings=engine.embeddings if engine else True,
        detail=engine.advice if engine and ready else state.detail,
        kv_used=stats.kv_used,
        size=header.size if header else 0,
        created=header.modified if header else 0,
        drafted=stats.drafted,
        accepted=stats.accepted,
        cached_tokens=stats.cached_tokens,
        prompt_tokens=stats.prompt_tokens,
        drafted_at=stats.drafted_at,
        accepted_at=stats.accepted_at,
        gain=round(stats.gain, 3),
    )


def under_all_names(state: ModelState, names: tuple[str, ...]) -> tuple[ModelState, ...]:
    """The model once under each of its names."""
    return tuple(
        state
        if name == state.name
        else msgspec.structs.replace(state, name=name, alias_of=state.name)
        for name in names
    )
