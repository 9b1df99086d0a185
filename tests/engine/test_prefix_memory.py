"""More conversations than slots, on a real engine: they go on where they were, to the same answers.

Batch-invariant, so that a greedy answer is the same, near ties included, whatever was computed
before and brought back. What a turn adds ends as a message does; of text that goes on without an
end less than a tile is computed once more (`tests/unit/test_engine_tiles.py`).
"""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import pytest_asyncio
from asking import frames_of, request, tokens_of
from engine_driver import EngineDriver

from shared.protocol import Sampling, TokenInput

pytestmark = [pytest.mark.model, pytest.mark.asyncio(loop_scope="module")]

CONVERSATIONS, TURNS = 5, 3
SAID = 30
"""Tokens that a turn adds to the prompt, the last of which ends a message."""
END = 2
"""<|im_end|>"""
ANSWER = 12
GREEDY = Sampling(seed=1, temperature=0, ignore_eos=True)


class Talk(NamedTuple):
    """What became of the turns of some conversations."""

    answers: list[list[int]]
    """Tokens, turn by turn, of all conversations in order."""
    cached: int
    """Prompt tokens after the first turns that were not computed again."""
    possible: int
    """Those that had been computed in earlier turns."""


async def talk(engine: EngineDriver, seed: int, *, at_once: bool = False) -> Talk:
    """Hold the conversations that belong to a seed, each turn of all of them before the next."""
    rng = random.Random(seed)
    told = [
        [(*rng.sample(range(1000, 40000), SAID - 1), END) for _ in range(TURNS)]
        for _ in range(CONVERSATIONS)
    ]
    prompts: list[tuple[int, ...]] = [()] * CONVERSATIONS
    answers: list[list[int]] = []
    cached = possible = 0
    for turn in range(TURNS):
        # the last token of an answer was sampled, but never went through the model
        possible += sum(max(0, len(prompt) - 1) for prompt in prompts)
        prompts = [prompt + said[turn] for prompt, said in zip(prompts, told, strict=True)]
        asked = [
            request(input=TokenInput(prompt), sampling=GREEDY, max_tokens=ANSWER)
            for prompt in prompts
        ]
        if at_once:
            turns = await asyncio.gather(*(frames_of(engine, one) for one in asked))
        else:
            turns = [await frames_of(engine, one) for one in asked]
        cached += sum(frames[-1].usage.cached for frames in turns)
        answers += [tokens_of(frames) for frames in turns]
        prompts = [p + tuple(tokens_of(f)) for p, f in zip(prompts, turns, strict=True)]
    return Talk(answers, cached, possible)


@asynccontextmanager
async def started(target: Path, slots: int, memory: int) -> AsyncIterator[EngineDriver]:
    engine = EngineDriver(
        str(target),
        slots=slots,
        context=256,
        threads=1,
        speculation="off",
        prefix_memory=memory,
        batch_invariant="on",
    )
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def roomy(q4_0: Path) -> AsyncIterator[EngineDriver]:
    """A slot for each conversation."""
    async with started(q4_0, CONVERSATIONS, 0) as engine:
        yield engine


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def remembering(q4_0: Path) -> AsyncIterator[EngineDriver]:
    async with started(q4_0, 2, 256 << 20) as engine:
        yield engine


async def test_conversations_in_turn_go_on_where_they_were(roomy, remembering):
    there = await talk(roomy, 1)
    brought = await talk(remembering, 1)

    assert there.cached == there.possible
    assert brought.cached > 0.9 * brought.possible
    assert brought.answers == there.answers


async def test_so_do_conversations_at_once(roomy, remembering):
    there = await talk(roomy, 2, at_once=True)
    brought = await talk(remembering, 2, at_once=True)

    assert brought.cached > 0.9 * brought.possible
    assert brought.answers == there.answers


async def test_without_memory_they_are_computed_again_to_the_same_answers(roomy, q4_0):
    there = await talk(roomy, 3)
    async with started(q4_0, 2, 0) as forgetful:
        again = await talk(forgetful, 3)

    assert again.cached < 0.1 * again.possible
    assert again.answers == there.answers
