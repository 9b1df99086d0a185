"""10,000 short requests of every kind leave no process larger than the first 1,000 did."""

import pytest

from loadtests.soak_memory import growths, report, soak

pytestmark = [pytest.mark.soak, pytest.mark.model, pytest.mark.nats, pytest.mark.timeout(5400)]


async def test_memory_is_flat_after_the_first_thousand_requests() -> None:
    samples = await soak(requests=10_000, every=250)
    assert samples[-1].requests == 10_000
    story = report(samples, 1_000)
    print(story)
    assert [str(growth) for growth in growths(samples, 1_000) if not growth.flat] == [], story
