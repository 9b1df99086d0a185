"""How long a dead engine waits for its next start, and what is said of its death."""

import signal

from hypothesis import given
from hypothesis import strategies as st

from worker.engine_process import Backoff
from worker.last_words import last_words


def test_waits_double_to_a_bound_and_begin_anew_after_health():
    backoff = Backoff(jitter=lambda: 1.0)
    assert [backoff.next(0.0) for _ in range(9)] == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    assert backoff.next(59.9) == 30
    assert backoff.next(60.0) == 0.5
    assert backoff.next(0.0) == 1


@given(deaths=st.integers(1, 3000), jitter=st.floats(0, 1))
def test_jitter_shortens_by_a_quarter_at_most(deaths: int, jitter: float):
    plain, jittered = Backoff(lambda: 1.0), Backoff(lambda: jitter)
    for _ in range(deaths):
        whole, wait = plain.next(0.0), jittered.next(0.0)
    assert 0.75 * whole <= wait <= whole <= 30


def test_the_telling_line_is_chosen():
    lines = ["loading", "GGML_ASSERT(x) failed", "backtrace"]
    assert last_words(-signal.SIGABRT, lines) == (
        "the engine was killed by SIGABRT: GGML_ASSERT(x) failed"
    )
    assert last_words(3, ["a", "b"]) == "the engine ended with exit code 3: b"
    assert last_words(None, []) == "the engine closed its connection"
    assert "out of memory" in last_words(-signal.SIGKILL, [])
    assert last_words(-250, []) == "the engine was killed by 250"
    assert len(last_words(1, ["error " * 1000])) < 400
