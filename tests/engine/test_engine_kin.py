"""A draft that is its target in another format drafts from what the target has computed."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from loadtests.stack import smollm2
from worker.engine.batch import Batch
from worker.engine.cache_state import UnknownState, for_flash_attention
from worker.engine.calibrate import asked_of
from worker.engine.calibration import nominal
from worker.engine.llama import Context, Model, silence
from worker.engine.slots import Slot
from worker.engine.speculation import setup
from worker.engine.speculation.costs import StepCost
from worker.engine.speculation.drafter import Drafter
from worker.engine.speculation.kinship import same_model
from worker.link import EngineConfig

pytestmark = pytest.mark.model

STEP_TOKENS = 256
VOCABULARY = 49_152
DRAFTED = 4
NUMBERS = ", ".join(f"{number}" for number in range(1, 25)) + ","
"""What comes next is plain to both models."""


class Guesser:
    """Takes the likeliest token."""

    def guess(self, row) -> tuple[int, float]:
        return int(row.argmax()), float(row.max())


@pytest.fixture(scope="module")
def contexts(f32: Path, q4_0: Path) -> Iterator[Callable[..., Context]]:
    """Make a context of the model with 32-bit weights, or of the same in Q4_0."""
    silence()
    with ExitStack() as stack:
        whole, small = Model(str(f32)), Model(str(q4_0))
        for model in (whole, small):
            stack.callback(model.close)

        def make(*, in_32_bits: bool = False, batch_invariant: bool = False) -> Context:
            context = Context(
                whole if in_32_bits else small,
                slots=2,
                context=512,
                step_tokens=STEP_TOKENS,
                threads=1,
                prefill_threads=1,
                batch_invariant=batch_invariant,
            )
            stack.callback(context.close)
            return context

        yield make


@pytest.fixture(scope="module")
def tokens(q4_0: Path) -> list[int]:
    model = Model(str(q4_0), vocab_only=True)
    try:
        return model.tokenize(NUMBERS, add_special=False, parse_special=False)
    finally:
        model.close()


def computed(context: Context, tokens: list[int]) -> Slot:
    """Slot 1, of which all tokens but the last are computed."""
    slot = Slot(1)
    slot.tokens, slot.cached = list(tokens), len(tokens) - 1
    batch = Batch(STEP_TOKENS)
    batch.fill(0, slot.index, tokens[:-1], 0)
    assert context.decode(batch, slot.cached) == 0
    return slot


def greedy(context: Context, slot: Slot) -> list[int]:
    """The tokens that follow."""
    batch, tokens = Batch(1), list(slot.tokens)
    for _ in range(DRAFTED):
        batch.fill(0, slot.index, tokens[-1:], len(tokens) - 1)
        batch.output[0] = 1
        assert context.decode(batch, 1) == 0
        tokens.append(int(context.logits(1)[0].argmax()))
    return tokens[len(slot.tokens) :]


def drafted(context: Context, slot: Slot, kin: Context | None) -> tuple[list[int], list[float]]:
    drafter = Drafter(context, StepCost(), step_tokens=STEP_TOKENS, vocabulary=VOCABULARY, kin=kin)
    drafter.took(slot.index, slot.index, 0)
    assert drafter.catch_up([slot])
    assert drafter.lag(slot) == 0
    drafts, sure = drafter.draft([slot], [Guesser()], DRAFTED, lambda _: True)
    return drafts[0], sure[0]


def test_it_drafts_what_it_would_have_drafted_had_it_read_the_text(contexts, tokens) -> None:
    target = contexts()
    slot = computed(target, tokens)

    assert drafted(contexts(), slot, target) == drafted(contexts(), slot, None)


@pytest.mark.parametrize("batch_invariant", [True, False])
def test_a_requantized_draft_goes_by_the_keys_and_values_of_its_target(
    contexts, tokens, batch_invariant
) -> None:
    target, draft = contexts(in_32_bits=True, batch_invariant=batch_invariant), contexts()
    slot = computed(target, tokens)

    assert (draft.cache_format is target.cache_format) == batch_invariant
    assert draft.take(slot.index, target)
    guesses, _ = drafted(draft, slot, target)
    assert guesses == greedy(target, slot)


def test_32_bits_are_handed_over_as_the_16_that_they_are_rounded_to(contexts, tokens) -> None:
    exact, flash = contexts(in_32_bits=True), contexts(in_32_bits=True, batch_invariant=True)
    slot = computed(exact, tokens)
    assert flash.take(slot.index, exact)
    handed = flash.save(slot.index)
    flash.forget(slot.index)
    computed(flash, tokens)
    own = flash.save(slot.index)

    assert handed.size == own.size
    # what is no key or value is the same, and those are, but for rounding
    near = np.abs(handed.view(np.float16).astype(float) - own.view(np.float16).astype(float))
    assert np.nanquantile(near, 0.999) < 0.02
    head = 8 + 4 * flash.slots + 12 * slot.cached
    assert np.array_equal(handed[:head], own[:head])


def test_what_was_rounded_is_not_handed_over_as_exact(contexts, tokens) -> None:
    exact, flash = contexts(in_32_bits=True), contexts(in_32_bits=True, batch_invariant=True)
    slot = computed(flash, tokens)
    computed(exact, tokens)

    assert not exact.take(slot.index, flash)
    computed(exact, tokens)  # the slot is empty: else llama.cpp would refuse the positions


def test_a_state_that_is_not_understood_is_not_handed_over(contexts, tokens) -> None:
    flash = contexts()
    slot = computed(flash, tokens)
    state = flash.save(slot.index)

    with pytest.raises(UnknownState, match="not kept number by number"):
        for_flash_attention(state)
    with pytest.raises(UnknownState, match="too soon"):
        for_flash_attention(state[:100])


def test_the_requantized_file_is_known_for_the_same_model(f32: Path, q4_0: Path) -> None:
    assert same_model(f32, q4_0)
    assert same_model(f32, smollm2())


def test_a_file_that_cannot_be_read_any_more_costs_the_draft_only(
    contexts, f32: Path, q4_0: Path, monkeypatch
) -> None:
    def gone(*_: Path) -> bool:
        raise FileNotFoundError("it was removed")

    monkeypatch.setattr(setup, "same_model", gone)
    config = EngineConfig(str(f32), "small", "w", draft=str(q4_0), slots=2, context=512)
    model = Model(str(f32), vocab_only=True)
    try:
        made, refusal = setup.make_speculator(
            config, model, contexts(in_32_bits=True), nominal(asked_of(config), 0)
        )
    finally:
        model.close()

    assert made is not None
    assert made.drafter is None
    assert "cannot draft for small: it was removed" in refusal
