"""What the worker tells of itself: to routers twice a second, to other workers less often.

Other workers hear it through a bucket, never directly (`shared.broker_config` says why); at once
where a model has changed its state, since that is what they decide by.
"""

import asyncio
import socket
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from shared import __version__, subjects
from shared.bus import Bus, BusUnavailable
from shared.kv import WORKERS, Kv
from shared.presence import Beat, RoleChange, encode_beat
from shared.rejects import Rejects
from worker import hardware
from worker.roster import Roster

__all__ = ("BEAT_SECONDS", "Beats")

BEAT_SECONDS = 0.5

CHANGES = 8
"""Role changes that are told."""


class Beats:
    """Makes and sends the beats; `run` lasts until it is cancelled."""

    def __init__(
        self,
        bus: Bus,
        roster: Roster,
        rejects: Rejects,
        *,
        memory: int,
        pause: Callable[[], float],
    ) -> None:
        """Make them.

        Args:
            bus: where they go.
            roster: what is told of.
            rejects: messages that were dropped.
            memory: bytes for all models together.
            pause: seconds between two beats that other workers hear.
        """
        self.changes: deque[RoleChange] = deque(maxlen=CHANGES)
        """The last role changes, the oldest first."""
        self.draining = False
        self.hop = 0.0
        """Seconds to NATS and back."""
        self.losses = 0
        """How often the connection to NATS was lost."""
        self._bus = bus
        self._kv = Kv(bus)
        self._roster = roster
        self._rejects = rejects
        self._memory = memory
        self._pause = pause
        self._changed = asyncio.Event()
        self._sequence = 0
        self._started = time.time()
        self._host = socket.gethostname()

    def hurry(self) -> None:
        """Something has changed: tell it at once."""
        self._changed.set()

    def presence(self) -> Beat:
        """The beat that would be sent now."""
        memory = hardware.memory()
        models = self._roster.states()
        found = {model.state for model in models}
        return Beat(
            worker=self._bus.identity,
            state=(
                "draining"
                if self.draining
                else "ready"
                if "ready" in found
                else "loading"
                if "loading" in found
                else "standby"
            ),
            sequence=self._sequence,
            models=models,
            host=self._host,
            version=__version__,
            started=self._started,
            memory_total=memory.total,
            memory_used=memory.used,
            able=self._roster.able,
            parts=self._roster.parts,
            stages=self._roster.stage_states(),
            hop=self.hop,
            memory_budget=self._memory,
            changes=tuple(self.changes),
            dropped=self._rejects.total,
            losses=self.losses,
            tasks=len(asyncio.all_tasks()),
        )

    async def run(self) -> None:
        """Send beats until cancelled; those that cannot be sent are left out."""
        told, states = 0.0, ""
        while True:
            self._changed.clear()
            self._sequence += 1
            beat = self.presence()
            data = encode_beat(beat)
            with suppress(BusUnavailable):  # the bus says so itself, once an outage
                await self._bus.publish(subjects.beat(self._bus.identity), data)
                now, news = time.monotonic(), _news(beat)
                if news != states or now - told >= self._pause():
                    await self._kv.tell(WORKERS, self._bus.identity, data)
                    told, states = now, news
            with suppress(TimeoutError):
                async with asyncio.timeout(BEAT_SECONDS):
                    await self._changed.wait()

    async def say_gone(self) -> None:
        """The last beat; raises BusUnavailable."""
        self._sequence += 1
        gone = Beat(self._bus.identity, "gone", self._sequence, host=self._host)
        await self._bus.publish(subjects.beat(self._bus.identity), encode_beat(gone))
        await self._kv.tell(WORKERS, self._bus.identity, None)


def _news(beat: Beat) -> str:
    """What other workers want to know at once."""
    models = ",".join(f"{model.name}={model.state}" for model in beat.models)
    parts = ",".join(f"{part.name}={part.missing}" for part in beat.parts)
    stages = ",".join(f"{stage.group}={stage.state}" for stage in beat.stages)
    return f"{beat.state} {models} {len(beat.able)} {parts} {stages}"
