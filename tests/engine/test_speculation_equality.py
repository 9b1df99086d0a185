"""Streams of all kinds, with speculation and without: the check of the whole, in small."""

from pathlib import Path

import pytest

from loadtests.check_equality import KINDS, check

pytestmark = [pytest.mark.model, pytest.mark.slow]


@pytest.mark.timeout(600)
async def test_streams_are_equal_or_part_at_near_ties(f32: Path, q4_0: Path) -> None:
    outcomes = await check(f32, q4_0, count=24, tokens=48)

    assert {outcome.kind for outcome in outcomes} == set(KINDS)
    assert sum(outcome.drafted for outcome in outcomes) > 0
    assert all(d.gap < 0.1 for outcome in outcomes for d in outcome.differences)
    assert sum(not outcome.differences for outcome in outcomes) >= 22
