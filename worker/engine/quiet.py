"""What of a choice the client has already: it is generated, or replayed, and told as tokens alone.

Where the tokens are drawn once more, it is not certain that they come out the same: rounding may
decide a near tie the other way. So their check is compared before anything is told behind them.
"""

from shared.errors import CannotContinue
from shared.protocol import Had
from shared.token_check import extend_check

__all__ = ("Quiet",)


class Quiet:
    """Follows the tokens of one choice, from the first one."""

    __slots__ = ("_check", "_had")

    def __init__(self, had: Had) -> None:
        self._had = had
        self._check = 0

    @property
    def whole(self) -> bool:
        """The client has the text that only the end makes certain, too."""
        return self._had.whole

    def covers(self, token: int, count: int) -> bool:
        """Take the next token, with which there are `count`; whether the client has it.

        Raises:
            CannotContinue: what the client has is not how this answer begins.
        """
        had = self._had
        if count > had.count:
            if had.whole:
                raise _differs()
            return False
        self._check = extend_check(self._check, (token,))
        if count == had.count and self._check != had.check:
            raise _differs()
        return True

    def ends(self, count: int) -> bool:
        """Whether the client has just these tokens: what follows belongs to another frame."""
        return count == self._had.count

    def end(self, count: int) -> None:
        """The choice is complete with so many tokens.

        Raises:
            CannotContinue: the client has more.
        """
        if count < self._had.count:
            raise _differs()


def _differs() -> CannotContinue:
    return CannotContinue(
        "The answer cannot go on: generated once more, it came out different from what the client "
        "has of it."
    )
