"""Messages that are dropped are all counted, and told of now and then."""

import structlog

from shared.rejects import TELL_SECONDS, Rejects


def test_all_are_counted_and_the_log_is_told_once_in_a_while() -> None:
    now = 100.0
    rejects = Rejects(lambda: now)
    with structlog.testing.capture_logs() as logs:
        for number in range(1000):
            rejects.add("frames", error=f"bad {number}")
        rejects.add("beat", error="other")
        now += TELL_SECONDS
        rejects.add("frames", error="later")
        rejects.add("frames", error="not told")
    assert rejects.counts == {"frames": 1002, "beat": 1}
    assert rejects.total == 1003
    told = [(line["kind"], line["count"], line["error"]) for line in logs]
    assert told == [("frames", 1, "bad 0"), ("beat", 1, "other"), ("frames", 1000, "later")]
