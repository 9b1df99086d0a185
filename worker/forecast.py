"""How long requests will wait and take, from those of late. Pure: times come in."""

from collections.abc import Sequence

__all__ = ("Forecast",)

WEIGHT = 0.1
"""Of the newest in the means: some ten requests count."""


class Forecast:
    """Means over the requests that one model's slots have answered; seconds everywhere."""

    def __init__(self) -> None:
        self._seconds = 1.0
        self._seconds_a_token: float | None = None

    def ended(self, seconds: float, tokens: int) -> None:
        """Learn from a request that had a slot for so long and could have had so many tokens.

        Args:
            seconds: in the slot.
            tokens: the most that it wanted; 0: it did not say.
        """
        seconds = max(0.0, seconds)
        self._seconds += WEIGHT * (seconds - self._seconds)
        if tokens:
            ratio = seconds / tokens
            before = ratio if self._seconds_a_token is None else self._seconds_a_token
            self._seconds_a_token = before + WEIGHT * (ratio - before)

    def wait(self, ahead: int, slots: int, ages: Sequence[float]) -> float:
        """Guess when a slot comes to one that has so many before it.

        Slots come free evenly, each after the mean time; what runs for longer than that already
        will go on for as long again.

        Args:
            ahead: how many wait and go first.
            slots: in all.
            ages: for how long those that run have been at it.
        """
        seconds = max(self._seconds, sum(ages) / len(ages) if ages else 0.0)
        return seconds * (ahead + 1) / slots

    def answer(self, tokens: int) -> float:
        """Guess how long a request keeps its slot; rather too short than too long.

        Args:
            tokens: the most that it wants; 0: it does not say.
        """
        if not tokens or self._seconds_a_token is None:
            return self._seconds
        return min(self._seconds, tokens * self._seconds_a_token)
