"""Sharing one worker's memory between its models, in the order in which they are ready to load.

Pure arithmetic. A model is granted what it wishes for, down to a fair share of what is left, but
never less than it needs at least; one whose least does not fit is refused and the others go on.
"""

from typing import NamedTuple

from shared.sizes import format_size

__all__ = ("MOST_PREFIXES", "Grant", "MemoryBudget", "NotEnoughMemory", "usual_prefixes")

MOST_PREFIXES = 4 << 30
"""Bytes that a model's prefixes may have if nobody says otherwise. Where they do not all fit,
conversations that take turns evict each other, and hardly any is found again."""


class Grant(NamedTuple):
    """What one model may use."""

    model: int
    """Bytes, its draft's not counted; 0: no limit."""
    draft: bool
    """Whether its draft has been granted as well."""
    prefixes: int = 0
    """Bytes for prefixes in host memory, neither the model's nor its draft's."""


class NotEnoughMemory(Exception):
    """A model does not fit; the message names both sizes."""


def usual_prefixes(total: int) -> int:
    """Bytes for a model's prefixes on a worker that has so many in all; 0: nothing is limited."""
    return min(MOST_PREFIXES, total // 4) if total else MOST_PREFIXES


class MemoryBudget:
    """`total` bytes for `models` models that have yet to claim; 0 means that nothing is limited."""

    def __init__(self, total: int, models: int) -> None:
        self.total = total
        self.left = total
        self.outstanding = models

    def claim(self, *, least: int, wish: int, draft: int = 0, prefixes: int = 0) -> Grant:
        """Grant one model its bytes, and those of its draft if they are well spent.

        A draft must fit into the model's fair share beside what the model needs at least, and may
        cost it at most a quarter of what it would have had alone. Prefixes get what both leave of
        the share.

        Args:
            least: bytes without which the model cannot be served.
            wish: bytes beyond which it has no use for more.
            draft: bytes of the draft, all of them or none; 0: there is none.
            prefixes: most bytes for prefixes.

        Raises:
            NotEnoughMemory: not even `least` is left.
        """
        if self.outstanding < 1:
            raise ValueError("more claims than models")
        share = self.left // self.outstanding
        self.outstanding -= 1
        if not self.total:
            return Grant(0, bool(draft), prefixes)
        if least > self.left:
            raise NotEnoughMemory(
                f"needs at least {format_size(least)}, "
                f"{format_size(self.left)} of {format_size(self.total)} are left"
            )
        alone = max(least, min(wish, share))
        beside = min(wish, share - draft)
        drafts = draft > 0 and beside >= least and 4 * beside >= 3 * alone
        model, used = (beside, beside + draft) if drafts else (alone, alone)
        spare = max(0, min(prefixes, share - used))
        self.left -= used + spare
        return Grant(model, drafts, spare)

    def waive(self) -> None:
        """One model will not claim: its share is for the others."""
        self.outstanding -= 1
