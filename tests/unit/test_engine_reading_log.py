"""What is kept of answers: by owner and key, for a time, within bytes, and of one attempt each."""

from hypothesis import given
from hypothesis import strategies as st

from shared.protocol import Generate, Reading, Sampling, TextInput
from worker.engine.reading_log import ReadingLog, Record


def asks(key: int, owner: str = "me") -> Generate:
    fields = {"owner": owner, "reading": Reading(key)}
    return Generate("id", 1, "model", TextInput("x"), Sampling(1), 0.0, **fields)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_an_answer_is_kept_while_it_runs_and_for_a_time_after():
    clock = Clock()
    log = ReadingLog(seconds=10, clock=clock)
    record = Record(("me", 7), 1, 1)
    log.begin(record)
    record.take(0, (5, 6))
    clock.now += 1000

    assert log.find(asks(7)) is record
    assert list(record.tokens[0]) == [5, 6]
    assert log.find(asks(8)) is None
    assert log.find(asks(7, "another")) is None
    assert log.find(Generate("id", 1, "m", TextInput("x"), Sampling(1), 0.0)) is None

    log.end(record)
    assert log.size == record.size
    clock.now += 9.9
    assert log.find(asks(7)) is record
    clock.now += 0.2
    assert log.find(asks(7)) is None


def test_who_goes_on_takes_the_answer_over():
    log = ReadingLog()
    first, second = (Record(("me", 7), attempt, 1) for attempt in (1, 2))
    assert log.begin(first) is None
    assert log.begin(second) == 1
    log.end(first)
    assert log.size == 0
    assert log.find(asks(7)) is second
    log.end(second)
    third = Record(("me", 7), 3, 1)
    assert log.begin(third) is None
    assert log.size == 0
    assert log.find(asks(7)) is third


def test_nothing_is_kept_of_what_is_not_to_be_kept():
    log = ReadingLog()
    log.end(None)
    assert log.size == 0


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 400), st.floats(0, 30)), max_size=40),
    st.integers(2000, 6000),
)
def test_it_never_holds_more_than_it_may(answers, most):
    clock = Clock()
    log = ReadingLog(seconds=60, most_bytes=most, clock=clock)
    last: dict[int, tuple[float, Record]] = {}
    in_all = 0
    for key, tokens, pause in answers:
        clock.now += pause
        record = Record(("me", key), 1, 1)
        log.begin(record)
        record.take(0, range(tokens), "stop")
        log.end(record)
        last[key] = (clock.now, record)
        in_all += record.size
        assert log.size <= most
        kept = [one for k, (_, one) in last.items() if log.find(asks(k)) is one]
        assert record in kept or record.size > most
        assert sum(one.size for one in kept) <= log.size
        fresh = [one for ended, one in last.values() if clock.now - ended <= 60]
        assert in_all > most or kept == fresh
