"""A step that computes a prompt for nobody any more is broken off, and costs others nothing."""

import asyncio
from collections.abc import Iterator

import pytest
from asking import frames_of, idle, request, text_of
from engine_driver import EngineDriver
from slot_rows import decode_rows

from loadtests.stack import smollm2
from shared.protocol import End, Sampling
from worker.engine.llama import INTERRUPTED, Context, Model, silence

pytestmark = pytest.mark.model

ROWS = 200


@pytest.fixture
def context() -> Iterator[Context]:
    silence()
    model = Model(str(smollm2()))
    context = Context(model, slots=2, context=512, step_tokens=256, threads=1, prefill_threads=1)
    yield context
    context.close()
    model.close()


def test_what_was_broken_off_can_be_computed_again(context: Context) -> None:
    prompt, more = range(1000, 1000 + ROWS), range(5000, 5040)
    assert decode_rows(context, 0, prompt) == 0
    assert decode_rows(context, 0, more, ROWS) == 0
    undisturbed = context.logits(1)[0].copy()
    context.forget(0)

    assert decode_rows(context, 0, prompt) == 0
    context.interrupt()
    assert decode_rows(context, 0, more, ROWS) == INTERRUPTED
    context.clear_interrupt()
    context.forget(0, ROWS)

    assert decode_rows(context, 0, more, ROWS) == 0
    assert (context.logits(1)[0] == undisturbed).all()


async def test_a_step_that_runs_ends_early(context: Context) -> None:
    prompt = range(1000, 1000 + ROWS)
    running = asyncio.create_task(asyncio.to_thread(decode_rows, context, 0, prompt))
    # 200 rows take half a second at least; the pass has begun when this one comes.
    await asyncio.sleep(0.05)
    context.interrupt()

    assert await running == INTERRUPTED


LONG = "Sum up: " + " ".join(f"case {n} was about the harbour of town {n * 7}." for n in range(60))
ENDLESS = Sampling(seed=1, temperature=0, ignore_eos=True)


async def test_those_who_stay_are_told_the_same_whoever_leaves_amid_a_prompt(q4_0):
    engine = EngineDriver(str(q4_0), slots=4, context=1024, threads=1, speculation="off")
    await engine.start()
    try:
        staying = [
            request(f"Tell me about {thing}.", max_tokens=60, sampling=ENDLESS)
            for thing in ("the sea", "bread")
        ]
        streams = [asyncio.create_task(frames_of(engine, one)) for one in staying]
        leavers = 0
        while not all(stream.done() for stream in streams):
            leaving = request(LONG, max_tokens=8)
            told: list[object] = []
            engine.ask(leaving, told.append)
            await asyncio.sleep(0.03 + 0.02 * (leavers % 7))
            engine.cancel(leaving.attempt)
            leavers += 1
        with_them = [text_of(await stream) for stream in streams]
        await idle(engine)

        assert leavers > 3
        assert engine.stats.kv_used == 0
        ended = [(await frames_of(engine, request(LONG, max_tokens=8)))[-1] for _ in range(2)]
        assert all(isinstance(end, End) for end in ended)
        alone = await asyncio.gather(
            *(
                frames_of(
                    engine,
                    request(f"Tell me about {thing}.", max_tokens=60, sampling=ENDLESS),
                )
                for thing in ("the sea", "bread")
            )
        )
    finally:
        await engine.stop()

    # Two rows with company are rounded as two rows are: a near tie may fall otherwise.
    assert sum(a == text_of(b) for a, b in zip(with_them, alone, strict=True)) >= 1
    assert with_them[0][:40] == text_of(alone[0])[:40]
    assert with_them[1][:40] == text_of(alone[1])[:40]
