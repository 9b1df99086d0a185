"""What all models of a worker share."""

import threading
from collections.abc import Callable

import msgspec

from shared.bus import Bus
from shared.rejects import Rejects
from worker.body import Bodies
from worker.replies import Replies

__all__ = ("Surroundings",)


class Surroundings(msgspec.Struct, frozen=True):
    """What all models of a worker share."""

    bus: Bus
    replies: Replies
    bodies: Bodies
    rejects: Rejects
    stopping: threading.Event
    on_change: Callable[[], None]
    """A model has changed its state: beat."""
    on_release: Callable[[], None]
    """Something is over: look whether the worker is idle."""
