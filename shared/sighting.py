"""The fleet as the placement function wants to see it, made from what workers tell. Pure."""

from collections.abc import Iterable, Mapping

from shared.presence import Beat
from shared.snapshot import Holding, WorkerView

__all__ = ("costs_of", "slots_of", "view_of")


def costs_of(beat: Beat) -> Mapping[str, int]:
    """Bytes of each model that a worker could load."""
    return {model.name: model.memory for model in beat.able}


def view_of(beat: Beat, costs: Mapping[str, int]) -> WorkerView:
    """One worker, its models by their own names; `costs` are its own, or those of one like it."""
    return WorkerView(
        name=beat.worker,
        memory=beat.memory_budget,
        able=costs,
        holds=tuple(
            Holding(
                model=model.name,
                state=model.state,
                since=model.since,
                busy=model.busy,
                memory=model.memory,
                pinned=model.pinned,
            )
            for model in beat.models
            if model.state != "failed" and not model.alias_of
        ),
        parts=beat.parts,
        stages=beat.stages,
        hop=beat.hop,
        started=beat.started,
        open=beat.state not in ("draining", "gone"),
    )


def slots_of(beats: Iterable[Beat]) -> dict[str, int]:
    """Slots of a replica by model: what is really set up goes before what is promised.

    Where workers differ, all who see the same workers choose the same number.
    """
    promised: dict[str, int] = {}
    real: dict[str, int] = {}
    for beat in sorted(beats, key=lambda beat: beat.worker):
        promised.update((model.name, model.slots) for model in beat.able)
        real.update(
            (model.name, model.slots)
            for model in beat.models
            if model.state == "ready" and not model.alias_of and model.slots
        )
    return promised | real
