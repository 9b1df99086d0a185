"""Attempt numbers: random, of the size the wire has, and never given twice."""

from router.secret import attempt_number


def test_attempt_numbers_are_63_bits_and_do_not_repeat() -> None:
    numbers = [attempt_number() for _ in range(5000)]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= number < 1 << 63 for number in numbers)
    # Every bit is used: the chance that one never shows in 5,000 draws is nil.
    seen = 0
    for number in numbers:
        seen |= number
    assert seen == (1 << 63) - 1
