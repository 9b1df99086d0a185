"""The random draw of an output token, a pure function of (seed, choice, index).

Nothing is carried from token to token, so that a stream resumed on another worker, or verified out
of a draft, draws the same numbers.
"""

__all__ = ("uniform",)

_MASK = (1 << 64) - 1


def _mix(x: int) -> int:
    """SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def uniform(seed: int, choice: int, index: int) -> float:
    """A number in [0, 1) for token `index` of one choice."""
    return (_mix(_mix(_mix(seed & _MASK) ^ choice) ^ index) >> 11) * 2.0**-53
