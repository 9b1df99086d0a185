"""Which rows are computed besides, so that none is alone in a pass of llama.cpp."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.engine.batch_invariance import Beside, beside, passes
from worker.engine.invariant_context import variance
from worker.link import EngineConfig, RingPlace

RING = RingPlace("g", ("w", "v"), 0, "nats://u:p@127.0.0.1:1", "u")


def rows_of(counts: dict[int, int]) -> list[int]:
    """Slots of the rows of a step with so many rows of each slot."""
    return [slot for slot in sorted(counts) for _ in range(counts[slot])]


counts = st.dictionaries(st.integers(0, 8), st.integers(1, 6), min_size=1)


def test_passes_have_consecutive_slots_and_as_many_rows_of_each() -> None:
    assert passes([0, 1, 2]) == [[0, 1, 2]]
    assert passes([0, 2]) == [[0], [1]]
    # The second slot has two rows more than the others, which are no neighbours of it then.
    assert passes([0, 1, 1, 1, 2]) == [[0, 1, 4], [2, 3]]
    assert passes([3, 3, 3]) == [[0, 1, 2]]
    assert passes([]) == []


@given(counts)
def test_each_row_is_in_one_pass(counts) -> None:
    slots = rows_of(counts)

    assert sorted(row for rows in passes(slots) for row in rows) == list(range(len(slots)))


def test_a_row_alone_is_computed_twice() -> None:
    assert beside([4], [1]) == Beside(again=(0,))
    assert beside([0, 1, 1], [1, 0, 0]) == Beside(again=(2,), outputs=(1,))
    assert beside([0, 2], [1, 1]) == Beside(again=(0, 1))


def test_logits_alone_have_others_beside_them() -> None:
    assert beside([0, 0, 0], [0, 0, 1]) == Beside(outputs=(0,))
    assert beside([0, 1, 1], [1, 0, 1]) == Beside(again=(2,), outputs=(1,))


def test_a_usual_step_needs_nothing() -> None:
    assert beside([2, 3, 4], [1, 1, 1]) == Beside()
    assert beside([0, 0], [1, 1]) == Beside()
    assert beside([0, 0, 0], [0, 0, 0]) == Beside()


@given(counts, st.data())
def test_then_no_row_and_no_logits_are_alone(counts, data) -> None:
    slots = rows_of(counts)
    flags = st.lists(st.integers(0, 1), min_size=len(slots), max_size=len(slots))
    outputs = data.draw(flags)

    found = beside(slots, outputs)

    # Behind all others, as `InvariantContext` has them: llama.cpp keeps the order within a slot.
    with_these = [*slots, *(slots[row] for row in found.again)]
    asked = [1 if row in found.outputs else flag for row, flag in enumerate(outputs)]
    asked += [outputs[row] for row in found.again]
    for rows in passes(with_these):
        assert len(rows) > 1
        assert sum(asked[row] for row in rows) != 1
    assert all(not outputs[row] for row in found.outputs)


@pytest.mark.parametrize(
    ("asked", "fields", "ring", "told"),
    [
        ("on", {}, None, ""),
        ("on", {"gpu_layers": 3}, None, "on a GPU"),
        ("on", {"keeps_state": True}, None, "a recurrent state"),
        ("on", {}, RING, "several workers"),
        ("auto", {"gpu_layers": 3}, None, ""),
        ("off", {"gpu_layers": 3}, RING, ""),
    ],
)
def test_where_it_was_asked_for_and_cannot_be_that_is_told(asked, fields, ring, told) -> None:
    model = SimpleNamespace(**{"gpu_layers": 0, "keeps_state": False, **fields})
    config = EngineConfig("m.gguf", "m", "w", batch_invariant=asked, ring=ring)

    assert told in variance(model, config)
    assert bool(told) == bool(variance(model, config))
