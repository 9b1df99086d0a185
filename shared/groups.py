"""Groups: workers that carry one model together, each some of its layers.

The lease of a replica (`shared.leases`) names the whole group, so that host and stages are claimed
by one write or not at all. Its holder is the head, the last of the parts; the others see the lease,
load what it says of them, and let go of it when the lease is gone or names another group.
"""

from itertools import pairwise
from typing import Annotated

import msgspec

from shared.bounds import Count, Name

__all__ = ("DraftNeeds", "Group", "Part", "SplitModel", "StageState")

_Token = Annotated[str, msgspec.Meta(pattern=r"\A[a-z0-9]{1,64}\Z")]
_Layer = Annotated[int, msgspec.Meta(ge=0, le=100_000)]
_Some = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]


class Part(msgspec.Struct, frozen=True, array_like=True):
    """The layers from `start` to before `stop`, on one worker."""

    worker: Name
    start: _Layer
    stop: _Layer
    memory: Count
    """Bytes it takes there."""


class Group(msgspec.Struct, frozen=True, omit_defaults=True):
    """One life of a model on several workers; or on one, where only a small step has room."""

    id: _Token
    digest: str
    """Of the model's headers: all must mean the same model."""
    parts: Annotated[tuple[Part, ...], msgspec.Meta(min_length=1, max_length=64)]
    """In their order round the ring; the last one has the head."""
    slots: _Some
    context: _Some
    """Tokens of a sequence."""
    step: _Some
    """Rows of a step at most."""
    half: bool = False
    """Activations travel with 16 bits a number, not 32."""

    def __post_init__(self) -> None:
        workers = {part.worker for part in self.parts}
        if len(workers) < len(self.parts):
            raise ValueError("a worker has two parts of a group")
        if self.parts[0].start or any(part.start >= part.stop for part in self.parts):
            raise ValueError("the parts of a group begin with layer 0, and each has one")
        if any(one.stop != other.start for one, other in pairwise(self.parts)):
            raise ValueError("the parts of a group follow each other")

    @property
    def workers(self) -> tuple[str, ...]:
        """In the order of the parts."""
        return tuple(part.worker for part in self.parts)

    @property
    def head(self) -> Part:
        """The part that embeds tokens, computes logits and samples."""
        return self.parts[-1]

    def index(self, worker: str) -> int | None:
        """Which part is this worker's; None: it has none."""
        return next((n for n, part in enumerate(self.parts) if part.worker == worker), None)


class DraftNeeds(msgspec.Struct, frozen=True, array_like=True):
    """What a draft model takes beside the head's part; bytes."""

    weights: Count
    cell: Count
    """Keys and values of a token."""
    row: Count
    """Buffers, for each row of the widest step."""

    def memory(self, cells: int, step: int) -> int:
        """In all, with the group's cells and steps, which it follows."""
        return self.weights + cells * self.cell + min(cells, step) * self.row


class SplitModel(msgspec.Struct, frozen=True, array_like=True):
    """A model that is too large for a worker, and of which it could carry a part."""

    name: str
    digest: str
    size: int
    """Bytes of its file."""
    created: int
    """Unix time of the file."""
    context: int
    """Tokens that a sequence is to have, unless memory is short."""
    slots: int
    half: bool = False
    """As its head, it would have activations travel with 16 bits a number."""
    pinned: bool = False
    """The operator named it: it is wanted whatever the demand is."""
    aliases: tuple[str, ...] = ()
    missing: str = ""
    """Why the workers in sight cannot carry it together, or this one did not get it to run a moment
    ago; empty: they can, as far as is known."""
    draft: DraftNeeds | None = None
    """Of the draft model that it would have as the head."""


class StageState(msgspec.Struct, frozen=True, array_like=True):
    """A part that a worker carries, or is about to."""

    group: str
    """Empty: of none any more."""
    model: str
    start: int
    stop: int
    memory: int
    """Bytes it takes; 0 for the head's, which its model's state tells."""
    state: str
    """`loading`, `ready`, `failed`; or `kept`: loaded, for a group that may be formed anew."""
    detail: str = ""
    """Progress while loading, the reason when failed."""

    @property
    def taken(self) -> int:
        """Bytes that nobody else can have: what has failed or is kept goes when they are wanted."""
        return self.memory if self.state in ("loading", "ready") else 0
