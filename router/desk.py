"""What a call and the rest of the router need of each other."""

from collections.abc import Coroutine
from typing import Any, Literal, Protocol

from router.breakers import Breakers
from router.demand import Demand
from router.fleet import Fleet
from router.inbox import Inbox
from router.retrying import RetryBudget
from router.settings import Settings
from router.waiting import Held, WaitingRoom
from shared.bus import Bus
from shared.errors import MeshError
from shared.protocol import Frame
from shared.rejects import Rejects

__all__ = ("Desk", "Loss", "Sink")

Loss = Literal["lost", "failed", "stalled", "gap", "interrupted", "handed_back"]
"""Why an attempt ended early. `lost`: its worker is gone. `failed`: the worker says so, as when its
engine died. `stalled`: no token came. `gap`: a frame is missing. `interrupted`: nothing came since
the connection to NATS was away. `handed_back`: the worker lets the model go."""


class Sink(Protocol):
    """Who gets what becomes of a call."""

    def frame(self, part: int, frame: Frame) -> None:
        """Take a frame that counts: Delta, Done, End or EmbedResult, in order, without gaps."""
        ...

    def fail(self, error: MeshError) -> None:
        """The call has ended without an answer."""
        ...

    def resumed(self, reason: Loss) -> None:
        """The call's attempt was lost, or handed back; it goes on on another one."""
        ...


class Desk(Protocol):
    """What a call needs of its dispatcher."""

    bus: Bus
    inbox: Inbox
    fleet: Fleet
    settings: Settings
    demand: Demand
    waiting: WaitingRoom
    breakers: Breakers
    retries: RetryBudget
    rejects: Rejects

    def spawn(self, job: Coroutine[Any, Any, None]) -> None:
        """Run something beside."""
        ...

    def cancel(self, worker: str, attempt: int) -> None:
        """Tell a worker that an attempt is not wanted."""
        ...

    def nobody(self, model: str, busy: list[float]) -> MeshError:
        """Why no worker takes a request."""
        ...

    def hold(self, model: str, call: Held, busy: list[float], *, again: bool) -> bool:
        """Keep a call until its model is served; False: it should fail. Raises Unavailable."""
        ...
