"""A router that chooses its workers in another way, to compare ours with.

    random       any worker that serves the model, by its own door: what a NATS queue group does
                 whose members stay in it when they are full
    round-robin  each worker in turn, by its own door
    group        the queue group that full workers leave, then the shortest queue: what the router
                 did before it knew conversations and distances

`MESH_ROUTING` names it; all else is `mesh-router`.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from random import Random
from typing import Any

from router import cli, fleet
from shared.routing import Choice, Pool

__all__ = ("POOLS", "main")


class _Blind(Pool, ABC):
    """Knows who serves the model, and nothing else of them."""

    @property
    def all_eligible(self) -> bool:
        return False  # Else the queue group would be asked where all seem to be full.

    def choose(
        self,
        key: int | None = None,
        *,
        refused: Collection[str] = (),
        draw: int = 0,
        **_: Any,
    ) -> Choice | None:
        left = [worker for worker in self.eligible if worker not in refused]
        if not left:
            return None
        return Choice(self.pick(left, draw), "least_loaded", len(left))

    def has_room(self, worker: str) -> bool:
        return False  # Else a worker that has a queue would be left again.

    @abstractmethod
    def pick(self, workers: Sequence[str], draw: int) -> str:
        """Choose one of them, none of which has refused."""


class RandomPool(_Blind):
    def pick(self, workers: Sequence[str], draw: int) -> str:
        return Random(draw).choice(workers)


class RoundRobinPool(_Blind):
    _turn = os.getpid()

    def pick(self, workers: Sequence[str], draw: int) -> str:
        self._turn += 1
        return workers[self._turn % len(workers)]


class GroupPool(Pool):
    @property
    def free(self) -> int:
        return 0  # Has the queue group asked first.

    def choose(self, key: int | None = None, **how: Any) -> Choice | None:
        return super().choose(None, **(how | {"begun": False}))


POOLS: dict[str, type[Pool]] = {
    "mesh": Pool,
    "random": RandomPool,
    "round-robin": RoundRobinPool,
    "group": GroupPool,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `mesh-router` with another choice."""
    fleet.Pool = POOLS[os.environ.get("MESH_ROUTING", "mesh")]  # type: ignore[attr-defined]
    return cli.main(arguments)
