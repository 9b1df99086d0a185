"""Logits depend on the tokens before them alone: not on pieces, company, the clock, the cache."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
from asking import frames_of, request, tokens_of
from engine_driver import EngineDriver
from numpy.typing import NDArray

from loadtests.rings import model_file
from shared.protocol import ChatInput, Message, Resumed, Sampling
from worker.engine.batch import Batch
from worker.engine.llama import FLASH_ATTENTION_TILE, Context, Model
from worker.engine.tiles import tiled

pytestmark = pytest.mark.model

SIZE = 200
TOKENS = [random.Random(1).randrange(1_000, 40_000) for _ in range(1_000)]


# Two threads wait for each other, and for long where others have the cores.
@pytest.fixture(
    scope="module",
    params=[
        pytest.param("Q4_0", marks=pytest.mark.alone),
        pytest.param("Q4_1", marks=[pytest.mark.alone, pytest.mark.slow]),
    ],
)
def context(request, models) -> Context:
    path = str(model_file(request.param, models))
    return Context(Model(path), slots=3, context=512, step_tokens=512, threads=2, prefill_threads=2)


def logits(
    context: Context, pieces: Sequence[int], beside: Sequence[Sequence[int]] = ()
) -> NDArray[np.float32]:
    """After `SIZE` tokens, computed in these pieces; `beside`: rows of others in the same steps."""
    batch = Batch(512)
    for slot in range(3):
        context.forget(slot)
    done = [0, 0, 0]
    for number, piece in enumerate(pieces):
        others = [each[number] if number < len(each) else 0 for each in beside]
        rows = 0
        for slot, count in enumerate((piece, *others)):
            begin = done[slot]
            if count:
                rows = batch.fill(rows, slot, TOKENS[begin + slot :][:count], begin)
            done[slot] += count
            if slot == 0 and done[0] == SIZE:
                batch.output[rows - 1] = 1
        assert context.decode(batch, rows) == 0
    assert done[0] == SIZE
    return context.logits(1)[0].copy()


def test_any_pieces_of_whole_tiles_and_any_smaller_ones_behind_give_the_same_bits(context) -> None:
    assert context.tile == FLASH_ATTENTION_TILE
    whole = logits(context, [192, 8])

    for pieces in ([64, 64, 64, 8], [128, 64, 8], [192, 3, 5], [64, 128, *[2] * 4]):
        assert np.array_equal(logits(context, pieces), whole), pieces


def test_neither_do_others_in_the_steps_of_the_smaller_pieces(context) -> None:
    alone = logits(context, [192, 8])

    assert np.array_equal(logits(context, [64, 64, 64, 3, 5], [[0, 0, 0, 1, 1]]), alone)
    assert np.array_equal(logits(context, [192, 4, 4], [[0, 30, 1], [0, 60, 1]]), alone)


def test_smaller_pieces_alone_give_the_same_bits_too(context) -> None:
    first = logits(context, [50] * 4)

    for pieces in ([63, 63, 63, 11], [20] * 10, [40, 60, 60, *[2] * 20]):
        assert np.array_equal(logits(context, pieces), first), pieces
    assert np.array_equal(logits(context, [50] * 4, [[60, 1, 1, 1], [1, 1, 50, 1]]), first)


def test_but_not_those_of_whole_tiles(context) -> None:
    """Else there would be no need of a rule."""
    assert not np.array_equal(logits(context, [50] * 4), logits(context, [192, 8]))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engines(q4_0: Path) -> AsyncIterator[list[EngineDriver]]:
    drivers = [EngineDriver(str(q4_0), slots=6, context=1024, threads=1) for _ in range(2)]
    for driver in drivers:
        await driver.start()
    yield drivers
    for driver in drivers:
        await driver.stop()


RULES = " ".join(f"Rule {n}: {word} is never left out." for n, word in enumerate("abcdefghijk"))


def asked(number: int, **fields):
    """A prompt of some 250 tokens, most of which all have in common."""
    talk = (Message("system", RULES), Message("user", f"Tell me of {number * 37} things, please."))
    return request(
        input=ChatInput(talk),
        max_tokens=40,
        sampling=Sampling(seed=number, temperature=0.8),
        **fields,
    )


@pytest.mark.asyncio(loop_scope="module")
async def test_a_long_prompts_answer_is_the_same_cold_cached_in_company_and_resumed(
    engines,
) -> None:
    first, second = engines
    alone = [tokens_of(await frames_of(first, asked(n))) for n in range(5)]
    # All at once, on an engine that has computed nothing.
    together = await asyncio.gather(*(frames_of(second, asked(n)) for n in range(5)))
    assert [tokens_of(frames) for frames in together] == alone
    # The other way round, when each has nearly all of its prompt in some slot.
    again = await asyncio.gather(*(frames_of(second, asked(n)) for n in reversed(range(5))))
    assert [tokens_of(frames) for frames in reversed(again)] == alone

    for number, tokens in enumerate(alone):
        wanted = asked(number, resume=(Resumed(tokens=tuple(tokens[:17])),))
        assert tokens_of(await frames_of(first, wanted)) == tokens[17:]


@pytest.mark.asyncio(loop_scope="module")
async def test_the_turns_of_a_conversation_are_the_same_cached_and_cold(engines, q4_0) -> None:
    talk = [Message("system", RULES + " Be kind.")]
    prompt = 0
    cold = EngineDriver(str(q4_0), slots=1, context=1024, threads=1)
    await cold.start()
    try:
        for turn in range(4):
            # Messages of less than a tile and of more.
            talk.append(Message("user", f"Tell me of {turn} things. " + RULES * (turn % 2)))
            fields = {"input": ChatInput(tuple(talk)), "max_tokens": 20}
            cached = await frames_of(engines[0], request(**fields))
            again = await frames_of(cold, request(**fields))
            assert tokens_of(again) == tokens_of(cached), turn
            assert again[-1].usage.cached < 32
            if turn:
                # What was computed for the last turn is all used.
                assert cached[-1].usage.cached == prompt
            prompt = cached[-1].usage.prompt
            talk.append(Message("assistant", "Many of them, and all are well."))
            await frames_of(cold, request("Something else.", max_tokens=1))
    finally:
        await cold.stop()


def test_the_prompts_of_these_tests_have_whole_tiles() -> None:
    assert tiled(SIZE, FLASH_ATTENTION_TILE) == 192
