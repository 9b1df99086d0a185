"""Threads of a context: set when they change and only then, the draft model's with them."""

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from worker.engine.calibration import Calibration
from worker.engine.governor import Governor
from worker.engine.threads import Threads

CALIBRATION = Calibration(
    threads=2,
    prefill_threads=4,
    poll=-1,
    step_seconds=((1, 0.010), (8, 0.030)),
    prefill_row_seconds=0.004,
)


class Machine:
    """Records what it is told; beside busy neighbours, a step takes longer with each thread."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int]] = []

    def set_threads(self, decode: int, prefill: int) -> None:
        self.told.append((decode, prefill))

    @property
    def threads(self) -> tuple[int, int]:
        initial = (CALIBRATION.threads, CALIBRATION.prefill_threads)
        return self.told[-1] if self.told else initial

    def seconds(self, rows: int) -> float:
        threads = self.threads[0 if rows == 1 else 1]
        return CALIBRATION.seconds(rows) * threads


def with_draft() -> tuple[Machine, Machine, Threads]:
    target, draft = Machine(), Machine()
    return target, draft, Threads(target, CALIBRATION, SimpleNamespace(drafter=draft))


def decode(threads: Threads, machine: Machine, steps: int, rows: int = 1) -> None:
    for _ in range(steps):
        threads.choose(prefill=False)
        threads.measured(rows, machine.seconds(rows))


def test_at_first_nothing_is_set():
    target, draft, threads = with_draft()
    for prefill in (True, False, True):
        threads.choose(prefill=prefill)
    assert target.told == draft.told == []


def test_a_row_alone_and_several_have_threads_of_their_own():
    target, _, threads = with_draft()
    decode(threads, target, 3000)
    threads.choose(prefill=True)
    assert target.threads == (1, 4)

    target, _, threads = with_draft()
    decode(threads, target, 6000, rows=8)
    threads.choose(prefill=True)
    assert target.threads == (2, 1)


def test_nothing_is_tried_while_a_prompt_is_computed():
    target, draft, threads = with_draft()
    while target.threads == (2, 4):
        decode(threads, target, 1)
        threads.choose(prefill=False)
    assert target.threads == (1, 4)

    threads.choose(prefill=True)
    assert target.threads == (2, 4)
    threads.choose(prefill=False)

    assert target.told == draft.told == [(1, 4), (2, 4), (1, 4)]


def test_without_a_draft_model_the_target_alone_is_told():
    for speculator in (None, SimpleNamespace(drafter=None)):
        machine = Machine()
        threads = Threads(machine, CALIBRATION, speculator)
        decode(threads, machine, 3000)
        assert (1, 4) in machine.told


@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.integers(1, 8),
            st.sampled_from([0.001, 0.01, 0.03]),
            st.integers(1, 50),
        ),
        max_size=40,
    )
)
def test_each_step_has_what_its_governors_say_and_no_call_is_made_twice(steps):
    target, draft, threads = with_draft()
    narrow = Governor(CALIBRATION.threads, CALIBRATION.seconds)
    wide = Governor(CALIBRATION.prefill_threads, CALIBRATION.seconds)
    for prefill, rows, seconds, times in steps:
        for _ in range(times):
            threads.choose(prefill=prefill)
            if prefill:
                assert target.threads == (narrow.settled, wide.settled)
                continue
            assert target.threads == (narrow.threads, wide.threads)
            threads.measured(rows, seconds)
            (narrow if rows == 1 else wide).measured(rows, seconds)
    assert draft.told == target.told
    before = [(CALIBRATION.threads, CALIBRATION.prefill_threads), *target.told]
    assert all(earlier != later for earlier, later in zip(before, target.told, strict=False))
