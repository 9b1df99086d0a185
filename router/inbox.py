"""The one place where frames arrive: a wildcard subscription, and who waits for which attempt.

Frames are told apart by attempt alone; the reply subject only names the request that a "no
responders" status is for. The callback runs for every message of every stream: it decodes, looks
up, hands over, and does nothing else.
"""

from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol

import msgspec

from shared.bus import Bus, BusMessage
from shared.protocol import Frame, decode_frames
from shared.rejects import Rejects

__all__ = ("Inbox", "Receiver")

REUSE_AFTER = 1024
"""Reply slots rest this long in the queue, so that a late status cannot hit their next user."""


class Receiver(Protocol):
    """Who waits for the frames of one attempt."""

    def receive(self, frame: Frame) -> None:
        """Take one frame of the attempt."""
        ...

    def no_responders(self) -> None:
        """Nobody was subscribed where the request went."""
        ...

    def broken(self) -> None:
        """Taking a frame raised: whatever this was, it cannot go on."""
        ...

    def tick(self, now: float, wall: float) -> None:
        """Time has passed: monotonic and Unix seconds."""
        ...

    def lost(self, worker: str, why: str) -> None:
        """A worker is gone."""
        ...

    def unheard(self, worker: str) -> None:
        """A worker is not connected; it may come back before it counts as gone."""
        ...

    def interrupted(self, now: float) -> None:
        """The connection to NATS was away; frames may be missing."""
        ...

    def cut_off(self) -> None:
        """NATS is away for longer than answers wait for it."""
        ...


class Inbox:
    """Attempts in flight and the reply slots they were sent with."""

    def __init__(self, prefix: str, rejects: Rejects) -> None:
        self._prefix = f"{prefix}.r."
        self._rejects = rejects
        self.strays = 0
        """Frames of attempts that nobody waits for: late ones, or made up."""
        self._receivers: dict[int, Receiver] = {}
        self._slots: dict[int, Receiver] = {}
        self._slot_of: dict[int, int] = {}
        self._free: deque[int] = deque()
        self._next = 0

    @asynccontextmanager
    async def listening(self, bus: Bus) -> AsyncIterator[None]:
        """Hold the subscription."""
        subscription = await bus.subscribe(f"{self._prefix}*", self.on_message)
        await bus.barrier()
        try:
            yield
        finally:
            await subscription.leave()

    def __len__(self) -> int:
        return len(self._receivers)

    def receivers(self) -> list[Receiver]:
        """Everybody who waits, as of now."""
        return list(self._receivers.values())

    def register(self, attempt: int, receiver: Receiver) -> str:
        """Expect frames of an attempt; returns the reply subject to send it with."""
        if (before := self._receivers.get(attempt)) is not None:
            self.forget(attempt, before)
        if len(self._free) > REUSE_AFTER:
            slot = self._free.popleft()
        else:
            slot = self._next
            self._next += 1
        self._receivers[attempt] = receiver
        self._slots[slot] = receiver
        self._slot_of[attempt] = slot
        return f"{self._prefix}{slot}"

    def forget(self, attempt: int, receiver: Receiver) -> None:
        """Drop what still comes of an attempt, if it is this receiver's."""
        if self._receivers.get(attempt) is receiver:
            del self._receivers[attempt]
            slot = self._slot_of.pop(attempt)
            del self._slots[slot]
            self._free.append(slot)

    def on_message(self, message: BusMessage) -> None:
        """Hand the frames of one message to whom they belong."""
        if message.status:
            self._on_status(message)
            return
        try:
            frames = decode_frames(message.data)
        except msgspec.DecodeError as error:
            self._rejects.add("frames", subject=message.subject, error=str(error))
            return
        receivers = self._receivers
        for frame in frames:
            receiver = receivers.get(frame.attempt)
            if receiver is None:
                self.strays += 1
                continue
            try:
                receiver.receive(frame)
            except Exception:
                # The other streams' frames of this message must not suffer.
                self._rejects.add("failed_frame", subject=message.subject, exc_info=True)
                receiver.broken()

    def _on_status(self, message: BusMessage) -> None:
        slot = message.subject.rpartition(".")[2]
        receiver = self._slots.get(int(slot)) if slot.isdecimal() else None
        if receiver is not None and message.status == "503":
            receiver.no_responders()
