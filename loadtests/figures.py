"""From raw measurements to what a table shows: percentiles, medians with their range, Markdown."""

import statistics
from collections.abc import Iterable, Sequence

__all__ = ("markdown", "median_and_range", "percentile")


def percentile(values: Iterable[float], share: float) -> float:
    """Return the value below which `share` (0 to 1) of the values lie, by nearest rank.

    Raises:
        ValueError: there are no values, or `share` is outside 0 to 1.
    """
    ordered = sorted(values)
    if not ordered:
        raise ValueError("no values to take a percentile of")
    if not 0 <= share <= 1:
        raise ValueError(f"share {share} is outside 0 to 1")
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def _number(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def median_and_range(values: Sequence[float]) -> str:
    """Return `median [least-most]`, the median alone for one value, `-` for none."""
    if not values:
        return "-"
    middle = _number(statistics.median(values))
    if len(values) == 1:
        return middle
    return f"{middle} [{_number(min(values))}-{_number(max(values))}]"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
