"""Logits and texts that are the same in any company, with any number of threads."""

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from asking import frames_of, request, tokens_of
from engine_driver import EngineDriver
from numpy.typing import NDArray

from loadtests.rings import model_file
from shared.protocol import Resumed, Sampling
from worker.engine.batch import Batch
from worker.engine.invariant_context import (
    FLASH_ATTENTION_SPLIT,
    InvariantContext,
    make_context,
    variance,
)
from worker.engine.llama import Context, Model
from worker.link import EngineConfig

pytestmark = pytest.mark.model

TOKENS = [random.Random(1).randrange(1_000, 40_000) for _ in range(1_000)]


# Two threads wait for each other, and for long where others have the cores.
@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.alone) for name in ("F32", "Q4_0")]
)
def model(request, models) -> Model:
    return Model(str(model_file(request.param, models)))


@pytest.fixture(scope="module")
def context(model) -> InvariantContext:
    return InvariantContext(
        model, slots=5, context=300, step_tokens=128, threads=2, prefill_threads=2
    )


def step(context: Context, rows: dict[int, tuple[int, int]]) -> dict[int, NDArray[np.float32]]:
    """Compute a step: so many rows of each slot, behind so many tokens; logits of each last one."""
    batch, filled = Batch(128), 0
    for slot, (count, behind) in rows.items():
        filled = batch.fill(filled, slot, TOKENS[behind + slot :][:count], behind)
        batch.output[filled - 1] = 1
    assert context.decode(batch, filled) == 0
    return dict(zip(rows, context.logits(len(rows)).copy(), strict=True))


def cached(context: Context, tokens: dict[int, int]) -> None:
    """Have so many tokens in each slot's cache."""
    for slot in range(context.slots):
        context.forget(slot)
    for slot, count in tokens.items():
        for begin in range(0, count, 50):
            step(context, {slot: (min(50, count - begin), begin)})


def ends(context: Context, slot: int) -> int:
    """Tokens in a slot's cache."""
    memory = llama_cpp.llama_get_memory(context.handle)
    return int(llama_cpp.llama_memory_seq_pos_max(memory, slot)) + 1


def last(
    context: Context, behind: int, others: dict[int, int], *, own: int = 1
) -> NDArray[np.float32]:
    """Logits of a row of slot 1 behind so many tokens, the last ones of which are in its step.

    Others have 20 tokens before their rows. All but the last ten tokens are taken from slot 4.
    """
    if ends(context, 4) != behind - 10:
        cached(context, {4: behind - 10})
    for slot in range(4):
        context.forget(slot)
    assert context.copy(4, 1)
    before = behind + 1 - own
    for slot in others:
        step(context, {slot: (20, 0)})
    step(context, {1: (before - (behind - 10), behind - 10)})
    rows = {1: (own, before), **{slot: (count, 20) for slot, count in others.items()}}
    return step(context, dict(sorted(rows.items())))[1]


@pytest.mark.parametrize("behind", [30, FLASH_ATTENTION_SPLIT + 1])
def test_a_row_is_the_same_alone_in_company_and_behind_others_of_its_own(context, behind) -> None:
    alone = last(context, behind, {})

    assert np.array_equal(last(context, behind, {2: 1}), alone)
    assert np.array_equal(last(context, behind, {0: 1, 2: 3, 3: 1}), alone)
    # Not beside it: a pass of its own.
    assert np.array_equal(last(context, behind, {3: 1}), alone)
    assert np.array_equal(last(context, behind, {}, own=7), alone)
    assert np.array_equal(last(context, behind, {0: 5, 2: 2}, own=3), alone)
    context.set_threads(1, 1)
    assert np.array_equal(last(context, behind, {}), alone)
    context.set_threads(2, 2)


def test_nothing_is_left_of_rows_that_nobody_asked_for(context) -> None:
    cached(context, {1: 300})
    size = len(context.save(1))
    step(context, {1: (1, 300)})
    context.forget(1, 300)

    assert len(context.save(1)) == size


def test_the_last_token_of_all_has_no_room_for_another_behind_it(context) -> None:
    cached(context, {1: context.context - 1})

    logits = step(context, {1: (1, context.context - 1)})

    assert np.isfinite(logits[1]).all()


def test_without_it_a_row_alone_differs(model) -> None:
    """Else there would be no need of it."""
    plain = Context(model, slots=5, context=300, step_tokens=128, threads=2, prefill_threads=2)
    behind = FLASH_ATTENTION_SPLIT + 1

    assert not np.array_equal(last(plain, behind, {2: 1}), last(plain, behind, {}))
    plain.close()


@pytest.mark.parametrize("asked", ["auto", "on", "off"])
def test_it_is_chosen_for_weights_of_32_bits(model, asked) -> None:
    config = EngineConfig("m.gguf", "m", "w", batch_invariant=asked, step_tokens=64)
    made = make_context(model, config, slots=1, context=256, threads=1, prefill_threads=1)

    wanted = asked == "on" or (asked == "auto" and model.all_f32)
    assert isinstance(made, InvariantContext) == wanted
    assert variance(model, config) == ""
    made.close()


def asked(number: int, **fields):
    sampling = Sampling(seed=number, temperature=0.8)
    return request(f"Tell me of {number} things.", max_tokens=40, sampling=sampling, **fields)


async def tokens_of_each(engine: EngineDriver, numbers: Sequence[int]) -> list[list[int]]:
    """All at once."""
    frames = await asyncio.gather(*(frames_of(engine, asked(number)) for number in numbers))
    return [tokens_of(each) for each in frames]


@pytest.mark.asyncio
async def test_texts_with_weights_of_32_bits_are_the_same_alone_in_company_and_resumed(
    f32: Path,
) -> None:
    options = {"slots": 6, "context": 512, "threads": 1}
    plain = EngineDriver(str(f32), **options, speculation="off")
    drafting = EngineDriver(str(f32), **options, speculation="ngram")
    try:
        for engine in (plain, drafting):
            await engine.start()
        alone = [(await tokens_of_each(plain, [n]))[0] for n in range(3)]
        for engine in (plain, drafting):
            assert await tokens_of_each(engine, range(3)) == alone
        assert (await tokens_of_each(drafting, [2, 1, 0]))[::-1] == alone
        for number, tokens in enumerate(alone):
            wanted = asked(number, resume=(Resumed(tokens=tuple(tokens[:20])),))
            assert tokens_of(await frames_of(drafting, wanted)) == tokens[20:]
    finally:
        for engine in (plain, drafting):
            await engine.stop()
