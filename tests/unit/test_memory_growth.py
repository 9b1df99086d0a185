"""The verdict on memory: what counts as growth, and what does not."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.memory_growth import (
    JUDGED,
    Memory,
    Open,
    Sample,
    growths,
    memory_of,
    open_of,
    report,
    spark,
    too_short,
)
from loadtests.soak_memory import main

MB = 1_000_000


def samples(
    of: "list[tuple[int, float]]", process: str = "router", tasks: "tuple[int, ...]" = ()
) -> list[Sample]:
    """Samples in which one process holds so many MB, and the others 100 MB all the time; or has so
    many tasks, and the others ten.
    """

    def memory(name: str, size: float) -> Memory:
        held = int((size if name == process else 100) * MB)
        return Memory(rss=held, pss=held, private=held, anonymous=held)

    return [
        Sample(
            requests,
            requests / 10,
            {name: memory(name, size) for name in JUDGED},
            {name: Open(20, 3, tasks[at] if tasks and name == process else 10) for name in JUDGED},
        )
        for at, (requests, size) in enumerate(of)
    ]


@pytest.mark.parametrize("process", JUDGED)
def test_a_leak_is_told_in_the_process_that_has_it(process: str) -> None:
    leaking = samples([(n, 100 + n / 1000) for n in range(0, 10_001, 250)], process)
    found = [growth for growth in growths(leaking, 1_000) if not growth.flat]
    assert {growth.process for growth in found} == {process}
    assert {growth.field for growth in found} == {"rss", "anonymous"}
    assert found[0].grown == pytest.approx(9 * MB)
    assert f"NOT FLAT: {process}" in report(leaking, 1_000)


def test_nats_server_may_hold_what_it_held_with_its_blocks_filled_and_little_more() -> None:
    filled = Memory(*[50 * MB] * 4)
    # A block that is dropped, and the next one that fills.
    times = range(0, 10_001, 250)
    waves = samples([(n, 31 + n % 2_500 / 100) for n in times], "nats")
    assert all(growth.flat for growth in growths(waves, 1_000, filled))
    assert "NOT FLAT" not in report(waves, 1_000, filled)
    leaking = samples([(n, 31 + n / 400) for n in times], "nats")
    found = [growth for growth in growths(leaking, 1_000, filled) if not growth.flat]
    assert [(one.process, one.field) for one in found] == [("nats", "rss"), ("nats", "anonymous")]
    assert found[0].grown == 6 * MB


def test_what_the_first_requests_take_is_no_leak() -> None:
    warming = samples([(n, 50 + min(n, 1_000) / 10) for n in range(0, 10_001, 250)])
    assert all(growth.flat for growth in growths(warming, 1_000))
    assert "NOT FLAT" not in report(warming, 1_000)


def test_a_large_process_may_grow_by_a_share_of_its_size() -> None:
    large = samples([(n, 1_000 + n / 500) for n in range(0, 10_001, 250)])
    assert all(growth.flat for growth in growths(large, 1_000))


@pytest.mark.parametrize("process", JUDGED)
def test_tasks_that_stay_are_told_in_the_process_that_has_them(process: str) -> None:
    times = [(n, 100.0) for n in range(0, 10_001, 250)]
    leaking = samples(times, process, tuple(10 + n // 1_000 for n, _ in times))
    found = [growth for growth in growths(leaking, 1_000) if not growth.flat]
    assert [(growth.process, growth.field) for growth in found] == [(process, "tasks")]
    assert found[0].grown == pytest.approx(9, abs=0.5)
    assert "allowed 4" in str(found[0])
    come_and_go = samples(times, process, tuple(10 + n // 250 % 4 for n, _ in times))
    assert all(growth.flat for growth in growths(come_and_go, 1_000))


def test_the_kernel_tells_what_this_process_has_open() -> None:
    before = open_of(os.getpid(), 7)
    with open(os.devnull):
        now = open_of(os.getpid(), 7)
    assert now.descriptors == before.descriptors + 1
    assert now.threads >= 1
    assert now.tasks == 7


def test_too_few_samples_are_no_verdict() -> None:
    with pytest.raises(ValueError, match="only 2 samples after 1000 requests"):
        growths(samples([(0, 1), (1_000, 1), (1_250, 1)]), 1_000)


@given(st.lists(st.floats(0, 1e12), min_size=1, max_size=60))
def test_a_plot_has_a_mark_for_each_value_and_shows_the_most_as_the_highest(
    values: list[float],
) -> None:
    drawn = spark(values)
    assert len(drawn) == len(values)
    assert drawn[values.index(min(values))] == "▁"
    if max(values) - min(values) > 1:
        assert drawn[values.index(max(values))] == "█"


def test_the_kernel_tells_what_this_process_holds() -> None:
    held = memory_of(os.getpid())
    assert held.rss >= held.pss >= held.private > 0
    assert held.rss > held.anonymous > 0
    with pytest.raises(ProcessLookupError):
        memory_of(2**22 + 1)


@given(st.integers(0, 5000), st.integers(0, 3000), st.integers(1, 500))
def test_a_run_that_is_too_short_is_known_before_it_starts(
    requests: int, after: int, every: int
) -> None:
    taken = samples([(n, 100) for n in range(0, requests + 1, every)])
    if too_short(requests, after, every):
        with pytest.raises(ValueError, match="samples after"):
            growths(taken, after)
    else:
        assert growths(taken, after)


def test_what_would_be_right_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(requests=500) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "at least --requests 1500" in told
    assert too_short(1500, 1000, 250) == ""
