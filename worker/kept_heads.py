"""Heads whose group is over: they stay loaded for a while, for a group with the same cuts."""

import asyncio
from typing import NamedTuple

from worker.serving import Serving
from worker.stages import KEEP_SECONDS, Kind

__all__ = ("KeptHeads",)


class _Kept(NamedTuple):
    serving: Serving
    task: asyncio.Task[None]
    """Runs the serving."""
    kind: Kind
    memory: int
    """Bytes; they are anybody's who wants them."""
    end: asyncio.TimerHandle


class KeptHeads:
    """At most one for a model; each is let go of when nobody has taken it for `KEEP_SECONDS`."""

    def __init__(self) -> None:
        self._kept: dict[str, _Kept] = {}

    @property
    def tasks(self) -> tuple[asyncio.Task[None], ...]:
        """Those that run the servings."""
        return tuple(kept.task for kept in self._kept.values())

    def keep(self, serving: Serving, task: asyncio.Task[None], kind: Kind) -> None:
        """Keep one whose engine is there, and take it for nobody's."""
        end = asyncio.get_running_loop().call_later(KEEP_SECONDS, task.cancel)
        self._kept[serving.name] = _Kept(serving, task, kind, serving.memory, end)

    def take(self, model: str, kind: Kind, free: int) -> tuple[Serving, asyncio.Task[None]] | None:
        """One of this kind that needs no more than what is free; any other is let go of."""
        kept = self._kept.pop(model, None)
        if kept is None:
            return None
        kept.end.cancel()
        if kept.kind == kind and kept.memory <= free and not kept.task.done():
            return kept.serving, kept.task
        kept.task.cancel()
        return None

    def forget(self, serving: Serving) -> None:
        """Its engine has ended."""
        kept = self._kept.get(serving.name)
        if kept is not None and kept.serving is serving:
            kept.end.cancel()
            del self._kept[serving.name]

    def drop(self) -> None:
        """Let go of all: the memory is wanted."""
        for kept in self._kept.values():
            kept.end.cancel()
            kept.task.cancel()
        self._kept.clear()
