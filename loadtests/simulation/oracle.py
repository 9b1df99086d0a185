"""A centre that knows everything, to be compared with: what the best could do.

It knows every conversation that is to come, turn by turn, and how long answers take on hosts that
are not too busy; from that it knows how many requests of each model will be in flight at every
moment. It loads replicas `AHEAD` seconds before these need them, and drops what the next `KEPT`
seconds do not. What even it cannot know is how long a load takes.
"""

import math
from collections.abc import Iterable

from loadtests.simulation.clock import START
from loadtests.simulation.fleet import Fleet
from loadtests.simulation.hosts import Host, HostSpeed
from loadtests.simulation.traffic import Conversation
from shared.placement import Action

__all__ = ("AHEAD", "KEPT", "Oracle", "foresee")

AHEAD = 40.0
"""Seconds: more than most loads take."""
KEPT = 120.0
_BIN = 2.0
_CROWDED = 1.2
"""What neighbours on its host add to an answer's time, about."""
_MARGIN = 1.15
"""Slots for each request in flight: what is foreseen is not exact."""


def foresee(
    coming: Iterable[Conversation], speed: HostSpeed, seconds: float
) -> dict[str, list[int]]:
    """Requests in flight of each model, at most in each `_BIN` seconds, if none had to wait."""
    bins = int(seconds / _BIN) + 2
    changes: dict[str, list[int]] = {}
    for conversation in coming:
        steps = changes.setdefault(conversation.model, [0] * bins)
        at = conversation.begins
        for turn in conversation.turns:
            took = turn.fresh * speed.prompt_token + turn.answer * speed.token * _CROWDED
            steps[min(bins - 1, int(at / _BIN))] += 1
            steps[min(bins - 1, int((at + took) / _BIN) + 1)] -= 1
            at += took + turn.think
    for steps in changes.values():
        for number in range(1, bins):
            steps[number] += steps[number - 1]
    return changes


class Oracle:
    """Decides instead of the hosts."""

    def __init__(self, fleet: Fleet, foreseen: dict[str, list[int]]) -> None:
        self._fleet = fleet
        self._foreseen = foreseen
        fleet.clock.every(1.0, self._decide)

    def _wanted(self, model: str, ahead: float) -> int:
        """Replicas that the model will need at some time until `ahead` seconds from now."""
        foreseen = self._foreseen.get(model, [])
        elapsed = self._fleet.clock.now - START
        most = max(foreseen[int(elapsed / _BIN) : int((elapsed + ahead) / _BIN) + 1], default=0)
        return math.ceil(_MARGIN * most / self._fleet.plan.slots)

    def _decide(self) -> None:
        held: dict[str, list[Host]] = {model: [] for model in self._foreseen}
        for host in self._fleet.hosts.values():
            for model, loaded in host.models.items():
                if loaded.state != "draining":
                    held.setdefault(model, []).append(host)
        for model, holders in sorted(held.items()):
            surplus = len(holders) - self._wanted(model, KEPT)
            if surplus > 0:
                ready = [host for host in holders if host.models[model].state == "ready"]
                ready.sort(key=lambda host: (host.models[model].busy, host.name))
                for host in ready[:surplus]:
                    self._fleet.act(Action("demote", host.name, model, -1, "not needed"))
            self._load(model, self._wanted(model, AHEAD) - len(holders))

    def _load(self, model: str, missing: int) -> None:
        if missing <= 0:
            return
        taken = {number for name, number in self._fleet.leases if name == model}
        memory = self._fleet.able[model]
        hosts = sorted(
            (len(host.models), host.memory, name)
            for name, host in self._fleet.hosts.items()
            if name not in self._fleet.away
            and model not in host.models
            and host.used() + memory <= host.memory
        )
        for _, _, name in hosts[:missing]:
            number = min(set(range(len(taken) + 1)) - taken)
            taken.add(number)
            self._fleet.act(Action("promote", name, model, number, "will be needed"))
