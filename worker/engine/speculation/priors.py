"""What speculation expects before it has seen anything, and the classes by which it learns."""

__all__ = ("MATCHES", "SHARES", "SURENESS", "match_class", "sureness_class")

MATCHES = ((3, 0.35), (4, 0.5), (6, 0.65), (9, 0.8), (12, 0.9), (24, 0.97))
"""Least length of a match, and the chance at first that its next token is right."""

SURENESS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.97)
"""Chance at first that a draft token is right, by eighths of how sure the draft is of it."""

SHARES = (0.01, 0.01, 0.02, 0.02, 0.02, 0.03, 0.04, 0.85)
"""How often, at first, a draft token is of each eighth: hopeful, so that it is tried."""


def match_class(match: int) -> int:
    """The entry of `MATCHES` for a match of so many tokens."""
    return max(0, sum(1 for least, _ in MATCHES if match >= least) - 1)


def sureness_class(confidence: float) -> int:
    """The entry of `SURENESS` and `SHARES` for a draft that is so sure, 0 to 1."""
    return min(7, int(confidence * 8))
