"""A slot's KV in host memory and back: the next logits are the same, bit for bit."""

from collections.abc import Iterator

import numpy as np
import pytest
from slot_rows import decode_rows

from loadtests.stack import smollm2
from worker.engine.llama import Context, Model, silence

pytestmark = pytest.mark.model

PROMPT = list(range(1000, 1040))


@pytest.fixture(scope="module")
def context() -> Iterator[Context]:
    silence()
    model = Model(str(smollm2()))
    context = Context(model, slots=3, context=256, step_tokens=64, threads=1, prefill_threads=1)
    yield context
    context.close()
    model.close()


def compute(context: Context, slot: int, tokens: list[int], start: int = 0) -> np.ndarray:
    """Run tokens through a slot from position `start` on; the last one's logits."""
    assert decode_rows(context, slot, tokens, start) == 0
    return context.logits(1)[0].copy()


def test_a_saved_slot_goes_on_in_another_as_it_would_have(context: Context) -> None:
    compute(context, 0, PROMPT)
    state = context.save(0)
    assert state is not None
    again = compute(context, 0, [5, 6], len(PROMPT))
    compute(context, 0, PROMPT[::-1], len(PROMPT) + 2)
    compute(context, 1, PROMPT[::-1])

    assert context.restore(1, state)

    assert (compute(context, 1, [5, 6], len(PROMPT)) == again).all()


def test_saved_states_are_their_own(context: Context) -> None:
    states = []
    for slot, tokens in enumerate((PROMPT, PROMPT[:20])):
        context.forget(slot)
        compute(context, slot, tokens)
        states.append(context.save(slot))
    first, second = states
    assert first is not None
    assert second is not None
    kept = first.copy()
    context.swap(0, 1)

    assert (first == kept).all()
    assert first.nbytes > 1.5 * second.nbytes
    assert first.base is second.base is None


def test_a_restored_slot_can_be_cut_to_a_shorter_prefix(context: Context) -> None:
    context.forget(0)
    compute(context, 0, PROMPT)
    state = context.save(0)
    assert state is not None
    context.forget(2)
    compute(context, 2, PROMPT[:30])
    expected = compute(context, 2, [5, 6], 30)

    assert context.restore(1, state)
    assert context.forget(1, 30)

    # the cells are another batch's work, which may round otherwise
    assert np.allclose(compute(context, 1, [5, 6], 30), expected, atol=0.1)


def test_what_is_no_state_is_refused(context: Context) -> None:
    assert not context.restore(1, np.zeros(64, dtype=np.uint8))
