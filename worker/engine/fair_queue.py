"""Who is next: interactive before batch, and owners by turns. Pure policy; the clock is passed in.

Within a class, owners take turns by deficit round robin: at its turn an owner may start what its
account covers, and each round brings every account that has somebody waiting `QUANTUM` tokens. So
whoever asks for much waits for those who ask for little, and an owner that comes new joins behind
the others, once: nobody can come first for ever by calling himself somebody else each time.

Interactive requests go before batch requests. Once a batch request has waited for `BATCH_PATIENCE`,
one of every `BATCH_TURN` that are started is a batch request, until none has waited so long.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import Generic, NamedTuple, TypeVar

__all__ = ("BATCH_PATIENCE", "BATCH_TURN", "QUANTUM", "FairQueue")

QUANTUM = 64
"""Tokens an owner's account gets a round: less than most requests, so that turns are short."""
BATCH_PATIENCE = 30.0
"""Seconds for which a batch request waits for all that is interactive."""
BATCH_TURN = 4

T = TypeVar("T")


class _Entry(NamedTuple, Generic[T]):
    item: T
    cost: int
    arrived: float


class _Share(Generic[T]):
    """What one owner has waiting, and the tokens it may start."""

    __slots__ = ("credit", "entries")

    def __init__(self) -> None:
        self.entries: deque[_Entry[T]] = deque()
        self.credit = QUANTUM

    @property
    def lacks(self) -> int:
        """Tokens that its first entry costs beyond its account."""
        return max(0, self.entries[0].cost - self.credit)


class _Ring(Generic[T]):
    """Owners by turns."""

    def __init__(self) -> None:
        self._shares: OrderedDict[str, _Share[T]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._shares)

    @property
    def oldest(self) -> float:
        """When the entry came that has waited longest."""
        return min(share.entries[0].arrived for share in self._shares.values())

    def push(self, owner: str, entry: _Entry[T]) -> None:
        share = self._shares.get(owner)
        if share is None:
            share = self._shares[owner] = _Share()
        share.entries.append(entry)

    def pop(self) -> T:
        shares = self._shares
        if all(share.lacks for share in shares.values()):
            # Whole rounds in which nobody could start anything, at once.
            rounds = min(-(-share.lacks // QUANTUM) for share in shares.values())
            for share in shares.values():
                share.credit += (rounds - 1) * QUANTUM
        while True:
            owner, share = next(iter(shares.items()))
            if not share.lacks:
                break
            share.credit += QUANTUM
            shares.move_to_end(owner)
        entry = share.entries.popleft()
        share.credit -= entry.cost
        if not share.entries:
            del shares[owner]
        return entry.item

    def remove(self, unwanted: Callable[[T], bool]) -> int:
        removed = 0
        for owner, share in list(self._shares.items()):
            kept = deque(entry for entry in share.entries if not unwanted(entry.item))
            removed += len(share.entries) - len(kept)
            share.entries = kept
            if not kept:
                del self._shares[owner]
        return removed


class FairQueue(Generic[T]):
    """What waits for a slot."""

    def __init__(self) -> None:
        self._first: deque[T] = deque()
        self._interactive: _Ring[T] = _Ring()
        self._batch: _Ring[T] = _Ring()
        self._count = 0
        self._since_batch = 0

    def __len__(self) -> int:
        return self._count

    def push(self, item: T, *, owner: str, cost: int, batch: bool, now: float) -> None:
        """Let it wait.

        Args:
            item: what waits.
            owner: whose it is.
            cost: tokens it wants, at least 1.
            batch: it may wait for those that are not batch.
            now: monotonic seconds.
        """
        ring = self._batch if batch else self._interactive
        ring.push(owner, _Entry(item, max(1, cost), now))
        self._count += 1

    def push_first(self, items: Iterable[T]) -> None:
        """Let these wait before all others, in this order: they were next already."""
        items = list(items)
        self._first.extendleft(reversed(items))
        self._count += len(items)

    def pop(self, now: float) -> T:
        """Take the next one; there must be one."""
        self._count -= 1
        if self._first:
            return self._first.popleft()
        return (self._batch if self._batch_is_next(now) else self._interactive).pop()

    def remove(self, unwanted: Callable[[T], bool]) -> None:
        """Forget what is not wanted any more."""
        kept = deque(item for item in self._first if not unwanted(item))
        self._count -= len(self._first) - len(kept)
        self._first = kept
        self._count -= self._interactive.remove(unwanted) + self._batch.remove(unwanted)

    def _batch_is_next(self, now: float) -> bool:
        if not (self._interactive and self._batch):
            return bool(self._batch)
        if now - self._batch.oldest < BATCH_PATIENCE:
            self._since_batch = 0
            return False
        self._since_batch = (self._since_batch + 1) % BATCH_TURN
        return self._since_batch == 0
