"""An hour of short requests of every kind leaves no process larger than its beginning did."""

import os

import pytest

from loadtests.memory_growth import growths, report
from loadtests.soak_memory import soak

pytestmark = [pytest.mark.soak, pytest.mark.model, pytest.mark.nats, pytest.mark.timeout(3 * 3600)]

MINUTES = float(os.environ.get("MESH_SOAK_MINUTES", "60"))
"""At least, and until 10,000 requests are answered."""


async def test_nothing_grows_after_the_first_thousand_requests() -> None:
    samples, filled = await soak(requests=10_000, seconds=60 * MINUTES, every=250)
    assert samples[-1].requests >= 10_000
    assert samples[-1].seconds >= 60 * MINUTES
    story = report(samples, 1_000, filled)
    print(story)
    grown = [str(growth) for growth in growths(samples, 1_000, filled) if not growth.flat]
    assert grown == [], story
